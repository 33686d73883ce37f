"""Calibration feeds with a share of random tokens among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.runtime.data.feeds import Feed
from iobs_onnx.runtime.data.open import PAD_MASK

# Of the tokens of a copy. All of them replaced serves an encoder as well and a causal model less.
_REPLACED = 0.5


def with_random_tokens(
    feeds: Iterable[Feed], name: str, vocabulary: int, share: float, seed: int
) -> Iterator[tuple[Feed, float]]:
    """Yield the feeds, and after every second one a copy with random tokens, with their weights.

    The copy has the feed's shape and padding; each token is replaced with a probability of one
    half by one drawn from the whole vocabulary, except the first and the last of a sequence,
    which mark its ends. Its weight makes up for the feed without a copy: copies are `share` of all.

    Args:
        feeds: read once.
        name: the input that holds token ids.
        vocabulary: ids are `0 ... vocabulary - 1`.
        share: between 0 and 1, 1 excluded.
        seed: of the tokens.
    """
    random = np.random.default_rng(seed)
    iterator = iter(feeds)
    for first in iterator:
        yield first, 1.0
        second = next(iterator, None)
        if second is not None:
            yield second, 1.0
        counts = [_count(feed, name) for feed in (first, second) if feed is not None]
        weight = share / (1 - share) * sum(counts) / counts[0]
        yield {**first, name: _scrambled(first, name, vocabulary, random)}, weight


def _valid(feed: Feed, name: str) -> NDArray[np.bool_]:
    mask = feed.get(PAD_MASK)
    ids = feed[name]
    return mask != 0 if mask is not None and mask.shape == ids.shape else np.ones(ids.shape, bool)


def _count(feed: Feed, name: str) -> int:
    return max(1, int(_valid(feed, name).sum()))


def _scrambled(
    feed: Feed, name: str, vocabulary: int, random: np.random.Generator
) -> NDArray[np.generic]:
    ids, valid = feed[name], _valid(feed, name)
    if ids.ndim:
        positions = np.arange(ids.shape[-1])
        first = np.where(valid, positions, ids.shape[-1]).min(-1, keepdims=True)
        last = np.where(valid, positions, -1).max(-1, keepdims=True)
        valid = valid & (positions > first) & (positions < last)
    drawn = random.integers(0, vocabulary, ids.shape).astype(ids.dtype)
    return np.where(valid & (random.random(ids.shape) < _REPLACED), drawn, ids)
