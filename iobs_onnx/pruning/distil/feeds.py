"""Streams of feeds to train on: as many as are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import DataError
from iobs_onnx.passes import find_token_input
from iobs_onnx.runtime import Feed, InputSpec, SelfSamples, open_session
from iobs_onnx.runtime.data.open import PAD_MASK
from iobs_onnx.runtime.data.tokens import IDS

if TYPE_CHECKING:
    import onnxruntime as ort

# Texts in a feed that a model writes.
_WRITTEN = 4
# A mirrored image is an image where its last axis is its width.
_IMAGE_RANK = 4
# Of texts read again: those that are cut and joined, those with other tokens, and these tokens.
_SHARE, _REPLACED = 0.5, 0.15


def endless(feeds: Iterable[Feed], seed: int = 0, *, vary: bool = False) -> Iterator[Feed]:
    """Yield feeds for ever, each epoch in an order of its own.

    Where every input of every feed has its samples along the first axis and all agree in the
    others, samples are dealt anew to batches each epoch; other feeds stay as they are.

    Args:
        feeds: read once; all are kept.
        seed: of the orders.
        vary: from the second epoch on yield other versions of texts, :func:`varied`; those with
            padding stay as they are.

    Raises:
        DataError: there are no feeds.
    """
    kept = [dict(feed) for feed in feeds]
    if not kept:
        raise DataError("distillation: there are no feeds to train on")
    random = np.random.default_rng([seed, 1])
    yield from _epoch(kept, random)
    if not vary or not all(IDS in feed for feed in kept):
        while True:
            yield from _epoch(kept, random)
    seen = np.concatenate([feed[IDS][:, 1:].ravel() for feed in kept])
    while True:
        for feed in _epoch(kept, random):
            padded = PAD_MASK in feed and not np.all(feed[PAD_MASK])
            yield feed if padded else varied(feed, seen, random)


def _epoch(feeds: Sequence[Feed], random: np.random.Generator) -> Iterator[Feed]:
    """Yield all feeds once, their samples dealt anew where they fit together."""
    rows = _joined(feeds)
    if rows is None:
        for index in random.permutation(len(feeds)):
            yield feeds[index]
        return
    total = len(next(iter(rows.values())))
    size = min(total, max(len(next(iter(feed.values()))) for feed in feeds))
    order = random.permutation(total)
    for start in range(0, total - size + 1, size):
        chosen = order[start : start + size]
        yield {name: array[chosen] for name, array in rows.items()}


def _joined(feeds: Sequence[Feed]) -> Feed | None:
    """Return all feeds as one, None where they do not fit together sample by sample."""
    if len(feeds) < 2:
        return None
    shapes = {name: array.shape[1:] for name, array in feeds[0].items()}
    for feed in feeds:
        if feed.keys() != shapes.keys() or any(a.ndim < 2 for a in feed.values()):
            return None
        if any(array.shape[1:] != shapes[name] for name, array in feed.items()):
            return None
        if len({len(array) for array in feed.values()}) != 1:
            return None
    if len({len(next(iter(feed.values()))) for feed in feeds[:-1]}) > 1:
        return None
    return {name: np.concatenate([feed[name] for feed in feeds]) for name in shapes}


def mirrored(feeds: Iterable[Feed], seed: int = 0) -> Iterator[Feed]:
    """Yield feeds whose images `(batch, channels, height, width)` are mirrored, each by chance.

    Args:
        feeds: read as they are asked for.
        seed: of the choice.
    """
    random = np.random.default_rng([seed, 2])
    for feed in feeds:
        flips = {
            name: random.random(len(array)) < 0.5
            for name, array in feed.items()
            if array.ndim == _IMAGE_RANK and array.dtype.kind == "f"
        }
        flipped = {
            name: np.where(flip[:, None, None, None], feed[name][..., ::-1], feed[name])
            for name, flip in flips.items()
        }
        yield {**feed, **flipped}


def written(
    session: ort.InferenceSession,
    inputs: Sequence[InputSpec],
    vocabulary: int,
    *,
    length: int | None = None,
    start: int | None = None,
    batch: int = 4,
    chunk: int = 32,
    reuse: int = 3,
    seed: int = 0,
) -> Iterator[Feed]:
    """Yield text that a causal language model goes on writing, for ever.

    A chunk of texts is written when all that were written before have been read `reuse` times;
    what is read in between is drawn from all of them, :func:`varied`.
    See :class:`iobs_onnx.runtime.SelfSamples`.

    Args:
        session: of the dense model; with a cache of past keys and values writing is cheap.
        inputs: of the model.
        vocabulary: the number of tokens.
        length: tokens in a text. Default: what the model fixes, else 128.
        start: the first token of every text; None for one drawn for each.
        batch: texts in a feed.
        chunk: texts written at a time, in one batch where the model takes batches of any size.
        reuse: how often a text is read; 1 for fresh text at every step, at the price of writing it.
        seed: of the text and of the order.

    Raises:
        DataError: the model is no causal language model.
        OptionError: `start` is no token.
    """
    ids = next((spec for spec in inputs if spec.name == IDS), None)
    fixed = ids.shape[0] if ids is not None and ids.shape else None
    batch = fixed or batch
    chunk = -(-chunk // batch) * batch
    random = np.random.default_rng([seed, 3])
    pool: list[Feed] = []
    for part in range(2**31):
        # A seed of its own for each part, far from those of other runs.
        samples = SelfSamples(
            session,
            inputs,
            vocabulary,
            count=chunk,
            length=length,
            start=start,
            seed=(seed << 32) + part,
        )
        samples.feed(range(fixed or chunk))
        fresh = [samples.feed(range(at, at + batch)) for at in range(0, chunk, batch)]
        pool += fresh
        yield from fresh
        seen = np.concatenate([feed[IDS][:, 1:].ravel() for feed in pool])
        for _ in range((reuse - 1) * len(fresh)):
            yield varied(pool[random.integers(len(pool))], seen, random)


def own_text(
    model: ir.Model, path: Any, inputs: Sequence[InputSpec], config: PruneConfig
) -> Iterator[Feed]:
    """Yield text that the dense model of a run goes on writing, as its options say.

    Args:
        model: looks up tokens.
        path: the model as it was given; a file is run optimised.
        inputs: of the model.
        config: names length, first token, texts in a feed and seed.
    """
    tokens = find_token_input(model)
    assert tokens is not None, "calibration_sources has seen to it"
    return written(
        open_session(path, config.provider, gpu=config.gpu),
        inputs,
        tokens[1],
        length=config.sequence_length,
        start=config.start_token,
        batch=config.batch_size or _WRITTEN,
        seed=config.seed,
    )


def in_turn(*streams: Iterator[Feed]) -> Iterator[Feed]:
    """Yield a feed of each endless stream in turn."""
    while True:
        for stream in streams:
            yield next(stream)


def varied(feed: Feed, tokens: NDArray[np.generic], random: np.random.Generator) -> Feed:
    """Return texts that were read before as others, whose targets are no longer known by heart.

    Half of the texts go on, behind their first token, from a place within, and end in the beginning
    of another one; in half, one token in seven is another one. All have full length, unpadded.

    Args:
        feed: with `input_ids`, `(batch, length)`; all other inputs stay.
        tokens: what replaces tokens, as often as each stands there.
        random: decides.
    """
    rows = feed[IDS].copy()
    count, length = rows.shape
    for row in rows:
        if length > 2 and random.random() < _SHARE:
            place = int(random.integers(1, length - 1))
            other = feed[IDS][random.integers(count)]
            row[1:] = np.concatenate([row[place + 1 :], other[:place]])
        if random.random() < _SHARE:
            chosen = np.less(random.random(length), _REPLACED)
            chosen[0] = False
            row[chosen] = random.choice(tokens, int(chosen.sum()))
    return {**feed, IDS: rows}
