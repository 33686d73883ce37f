"""Language models: text through the tokenizer beside the model."""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path
from typing import Any

import numpy as np
from made import Made, export, outputs_of, session, stays_near

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "integrations"), str(TESTS / "operators")]


def sentences(count: int) -> list[str]:
    """Prose that every Python has."""
    import minilm

    return minilm.docstrings(count)


def letters(folder: Path) -> int:
    """Write a tokenizer of single letters into a folder; return its size."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    marks = ["<pad>", "<unk>", " ", *string.ascii_lowercase, *".,:;'()-"]
    coder = Tokenizer(models.WordLevel({mark: at for at, mark in enumerate(marks)}, "<unk>"))
    coder.normalizer = normalizers.Lowercase()
    coder.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    coder.save(str(folder / "tokenizer.json"))
    return len(marks)


def text_of(folder: Path, count: int, length: int) -> list[str]:
    """Write sentences; return the options that name them."""
    (folder / "texts.txt").write_text("\n".join(sentences(count)))
    return ["--text", str(folder / "texts.txt"), "--sequence-length", str(length)]


def bert(folder: Path) -> Made:
    """all-MiniLM-L6-v2, trained; its embeddings of other text than calibrates."""
    import minilm

    model = minilm.export(TESTS.parent / "build" / "models" / "all-MiniLM-L6-v2.onnx")
    data = text_of(folder, 48, 64)
    data += ["--tokenizer", str(minilm.weights_folder() / "tokenizer.json")]
    others = minilm.feeds(minilm.reference_passages(64))

    def use(sparse: Path) -> None:
        dense, found = (minilm.embed(m, others) for m in (model, sparse))
        assert minilm.similarity_correlation(dense, found) > 0.75

    return Made(model, data, use)


def roberta(folder: Path) -> Made:
    """A small random RoBERTa, whose positions begin at 2; padded text."""
    import torch
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=letters(folder),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=50,
        pad_token_id=0,
        attn_implementation="eager",
    )
    ids = torch.ones(2, 12, dtype=torch.int64)
    model = export(
        RobertaModel(config, add_pooling_layer=False),
        {"input_ids": ids, "attention_mask": ids},
        folder / "model.onnx",
        "last_hidden_state",
        {name: {0: "batch", 1: "tokens"} for name in ("input_ids", "attention_mask")},
        dynamo=False,
    )
    told = np.random.default_rng(5).integers(3, 30, (4, 49))
    feeds = [{"input_ids": told, "attention_mask": np.ones_like(told)}]
    return Made(model, text_of(folder, 64, 49), stays_near(model, feeds, 0.9))


def llama_config(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "use_cache": False,
    }


def llama(folder: Path) -> Made:
    """A small random Llama, as torch exports it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**llama_config(letters(folder)), attn_implementation="eager")
    model = causal(LlamaForCausalLM(config), folder / "model.onnx")
    return Made(model, text_of(folder, 64, 48), generates(model))


def mixtral(folder: Path) -> Made:
    """A small random Mixtral, as torch exports it: experts read one by one from one tensor."""
    import experts

    letters(folder)
    model = experts.export("mixtral", folder / "model.onnx")
    return Made(model, text_of(folder, 96, 32), generates(model))


def causal(module: Any, path: Path) -> Path:
    """Export a causal language model, `input_ids (batch, tokens)` to `logits`."""
    import torch

    axes = {"input_ids": {0: "batch", 1: "tokens"}}
    example = {"input_ids": torch.ones(2, 12, dtype=torch.int64)}
    return export(module, example, path, "logits", axes, dynamo=True)


def generates(model: Path) -> Any:
    """Return a use: logits stay near the dense ones, and a text is gone on with."""

    def use(sparse: Path) -> None:
        ids = np.random.default_rng(5).integers(3, 30, (4, 24))
        stays_near(model, [{"input_ids": ids}], 0.9)(sparse)
        told = ids[:1, :4]
        for _ in range(8):
            (logits,) = outputs_of(sparse, [{"input_ids": told}])
            told = np.concatenate([told, logits[:, -1:].argmax(-1)], axis=1)
        assert told.shape == (1, 12)

    return use


def optimum_past(folder: Path) -> Made:
    """A small random Llama by `optimum-cli export onnx`, with past keys and values."""
    import subprocess

    import genai
    import pytest

    optimum = pytest.importorskip(
        "optimum.onnxruntime", reason="Optimum has an environment of its own: make test-optimum"
    )
    source = genai.hugging_face(folder / "source")
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "onnx"]
    command += ["--model", str(source), "--task", "text-generation-with-past"]
    subprocess.run([*command, str(folder / "dense")], check=True, capture_output=True)

    def use(sparse: Path) -> None:
        """Generation by Optimum, with and without the cache."""
        import torch

        model = optimum.ORTModelForCausalLM.from_pretrained(sparse.parent, file_name=sparse.name)
        start = torch.tensor([[60, 61, 62, 63]])
        given = {"inputs": start, "attention_mask": torch.ones_like(start), "do_sample": False}
        told, again = (
            model.generate(**given, max_new_tokens=12, use_cache=cached).tolist()
            for cached in (True, False)
        )
        assert told == again

    return Made(folder / "dense" / "model.onnx", text_of(folder, 64, 48), use, folder=True)


def built(folder: Path, precision: str, provider: str) -> Made:
    """A small random Llama by ONNX Runtime GenAI's builder."""
    import genai
    import pytest

    runtime = pytest.importorskip("onnxruntime_genai", reason="the wheel is not installed")
    source = genai.hugging_face(folder / "source")
    genai.build(source, folder / "dense", precision, provider)

    def use(sparse: Path) -> None:
        """Generation by ONNX Runtime GenAI: each token is the likeliest of the sparse model."""
        settings = sparse.parent / "genai_config.json"
        asked = json.loads(settings.read_text())
        asked["model"]["decoder"]["session_options"]["provider_options"] = []  # on the CPU
        settings.write_text(json.dumps(asked))
        model = runtime.Model(str(sparse.parent))
        options = runtime.GeneratorParams(model)
        options.set_search_options(max_length=20, do_sample=False)
        generator = runtime.Generator(model, options)
        generator.append_tokens(runtime.Tokenizer(model).encode("It runs"))
        while not generator.is_done():
            generator.generate_next_token()
        told = np.array(generator.get_sequence(0), np.int64)[None]
        running, start = session(sparse), len("It runs")  # a token a byte
        kind = np.float16 if precision == "fp16" else np.float32
        past = {i.name: np.zeros((1, 2, 0, 16), kind) for i in running.get_inputs()[2:]}
        feed = {"input_ids": told, "attention_mask": np.ones_like(told), **past}
        (logits,) = running.run(["logits"], feed)
        assert logits[0].argmax(-1)[start - 1 : -1].tolist() == told[0, start:].tolist()

    data = text_of(folder, 64, 48)
    return Made(folder / "dense" / "model.onnx", [*data, "--pack"], use, folder=True)
