"""STS-B: how well sentence embeddings rank pairs of sentences as people do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import minilm
import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

Embed = Callable[[list[str]], np.ndarray]


def pairs(shared: Path, count: int = 1500) -> tuple[list[str], list[str], np.ndarray]:
    """Return first sentences, second sentences, and the scores people gave."""
    lines = (shared / "data/stsb/stsb-dev.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines][:count]
    return [r[5] for r in rows], [r[6] for r in rows], np.array([float(r[4]) for r in rows])


def spearman(embed: Embed, shared: Path, count: int = 1500) -> float:
    """Return Spearman's correlation of cosine similarities with the scores."""
    from scipy.stats import spearmanr

    first, second, scores = pairs(shared, count)
    vectors = embed([*first, *second])
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = (vectors[: len(first)] * vectors[len(first) :]).sum(axis=1)
    return float(spearmanr(similarity, scores).statistic)


def embed_with(model: Path) -> Embed:
    """Return a function that embeds texts with an ONNX file: the mean of the tokens' states."""
    tokenizer = Tokenizer.from_file(str(minilm.weights_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(minilm.MAX_TOKENS)
    tokenizer.no_padding()
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])

    def embed(texts: list[str]) -> np.ndarray:
        encoded = tokenizer.encode_batch(texts)
        order = np.argsort([len(text) for text in texts], kind="stable")
        vectors = np.empty((len(texts), 384), np.float32)
        for index in _chunks(order, 32):
            feed = minilm._feed([encoded[at].ids for at in index])
            states = session.run(["last_hidden_state"], feed)[0]
            mask = feed["attention_mask"][..., None]
            vectors[index] = (states * mask).sum(1) / mask.sum(1)
        return vectors

    return embed


def _chunks(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
