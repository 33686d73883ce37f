"""What a step of training would take, measured on one before the first is taken."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from iobs_onnx.engine import available_memory
from iobs_onnx.errors import ModelError
from iobs_onnx.pruning.distil.training import Pair
from iobs_onnx.runtime import Feed
from iobs_onnx.runtime.differentiable import bfloat16_factors

# Copies of a trained tensor that training holds besides itself: its gradient, two averages of Adam,
# the first and the best state.
_COPIES = 5
# Of the memory left: what a forward pass may keep for its gradient, beside what passes by.
_SHARE = 0.7


class _Beyond(Exception):
    """More is kept than there may be."""


def kept_bytes(pair: Pair, feed: Feed, limit: float) -> int | None:
    """Return the bytes that a forward pass keeps for its gradient; None where beyond the limit.

    The pass ends as soon as it is beyond.
    """
    seen = {master.value.untyped_storage().data_ptr() for master in pair.masters}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        if total > limit:
            raise _Beyond
        return tensor

    try:
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, bfloat16_factors(pair.rounds):
            pair.distance(feed)
    except _Beyond:
        return None
    return total


def fitting(pair: Pair, feed: Feed) -> Pair:
    """Return the pair, or one that computes activations again where too many would be kept.

    Args:
        pair: keeps them.
        feed: one as steps take.

    Raises:
        ModelError: even then a step takes more memory than there is.
    """
    free = available_memory()
    limit = _SHARE * (free - _COPIES * sum(m.value.nbytes for m in pair.masters))
    if kept_bytes(pair, feed, limit) is not None:
        return pair
    pair = replace(pair, sparse=pair.sparse.recomputing())
    if kept_bytes(pair, feed, limit) is None:
        raise ModelError(
            f"distillation: a step keeps over {max(0.0, limit) / 1e9:.1f} GB for its gradient, too "
            f"much for the {free / 1e9:.1f} GB that are free; make batches smaller (--batch-size), "
            "or train block by block (--distill blocks)"
        )
    return pair
