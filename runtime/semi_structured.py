"""Time one layer with torch's semi-structured (2:4) kernels, that is cuSPARSELt, on CUDA.

No machine with CUDA was at hand when this was written: the CUDA part has not been run.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch.nn.functional import linear
from torch.sparse import to_sparse_semi_structured

from iobs_onnx.errors import CheckError

_WARM_UP = 5
# Half precision: both kernels sum in float32 and round the result to 11 bits, in another order.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class LayerTiming:
    """One shape of weight, fp16.

    Attributes:
        out_features, in_features: of the weight.
        rows: of the activation.
        dense_ms, sparse_ms: median milliseconds of the product.
    """

    out_features: int
    in_features: int
    rows: int
    dense_ms: float
    sparse_ms: float


def semi_structured_available() -> bool:
    """Whether torch can run 2:4 products here: CUDA, compute capability 8.0 or more."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def time_layer(weight: torch.Tensor, rows: int, rounds: int) -> LayerTiming:
    """Time `x @ weight.T` with the weight dense and as a semi-structured tensor.

    Args:
        weight: `(out, in)`, 2:4 along its last axis, both multiples of 16.
        rows: of a random activation.
        rounds: in each, both are timed.

    Raises:
        CheckError: the two products differ by more than rounding.
    """
    dense = weight.to("cuda", torch.float16).contiguous()
    sparse = to_sparse_semi_structured(dense)
    x = torch.randn(rows, weight.shape[1], device="cuda", dtype=torch.float16)
    expected, found = linear(x, dense), linear(x, sparse)
    scale = expected.float().abs().max()
    if not bool((found.float() - expected.float()).abs().max() <= _TOLERANCE * scale):
        raise CheckError(
            f"torch's semi-structured product of a {tuple(weight.shape)} weight is wrong: update "
            "torch, or leave this engine out"
        )
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    for number in range(-_WARM_UP, rounds):
        for name, operand in (("dense", dense), ("sparse", sparse)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            linear(x, operand)
            end.record()
            end.synchronize()
            if number >= 0:
                times[name].append(start.elapsed_time(end))
    out_features, in_features = weight.shape
    medians = [statistics.median(values) for values in times.values()]
    return LayerTiming(out_features, in_features, rows, *medians)
