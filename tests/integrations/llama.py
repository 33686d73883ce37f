"""stories15M as a transformers model, from the weights of its ONNX file, for Optimum to export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

MAX_TOKENS = 256


def rebuild(onnx_file: Path, tokenizer_file: Path, folder: Path) -> Path:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` reads; return it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast

    import iobs_onnx

    stored = ir.load(onnx_file).graph.initializers
    arrays = {
        name.removeprefix("m."): value.const_value.numpy()
        for name, value in stored.items()
        if name.endswith("norm.weight") or name == "m.lm_head.weight"
    }
    for site in iobs_onnx.inspect(onnx_file).sites:
        arrays[site.name.removeprefix("m.")] = stored[site.initializer].const_value.numpy().T
    arrays["model.embed_tokens.weight"] = arrays["lm_head.weight"]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    state = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    model.load_state_dict(state)
    model.save_pretrained(folder)
    LlamaTokenizerFast(vocab_file=str(tokenizer_file)).save_pretrained(folder)
    return folder


def stories(shared: Path, start: int, stop: int) -> list[str]:
    """Return stories by index; 0 to 59 calibrate, 60 to 119 judge."""
    path = shared / "data/tinystories/stories_first_120.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    texts = [story["story"] if isinstance(story, dict) else story for story in found]
    return texts[start:stop]


def perplexity(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Return the perplexity of an `ORTModelForCausalLM`, each text cut at 256 tokens."""
    import torch

    loss, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :MAX_TOKENS]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        loss += float(
            torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum")
        )
        count += ids.shape[1] - 1
    return float(np.exp(loss / count))
