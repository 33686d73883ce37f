"""A small random Llama as a Hugging Face folder, and what ONNX Runtime GenAI's builder makes of it.

`python tests/integrations/genai.py` writes the folders below `tests/data` that the fast tests read.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "data"


def hugging_face(folder: Path, *, hidden: int = 64, layers: int = 2) -> Path:
    """Write a model with a tied embedding, and a tokenizer of single bytes; return the folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({mark: at for at, mark in enumerate(marks)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(marks[:2])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(marks),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        num_key_value_heads=max(1, hidden // 32),
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=marks[0], eos_token=marks[1]
    )
    wrapped.save_pretrained(folder)
    return folder


def build(source: Path, folder: Path, precision: str, provider: str = "cpu") -> None:
    """Run the builder."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(source), "-o", str(folder), "-p", precision, "-e", provider]
    command += ["-c", str(source / "cache")]
    subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        small = hugging_face(Path(temporary, "hf"), hidden=32, layers=1)
        for kind in ("fp32", "int4"):
            shutil.rmtree(DATA / f"genai-{kind}", ignore_errors=True)
            build(small, DATA / f"genai-{kind}", kind)
