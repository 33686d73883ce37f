"""Post-training sparsity for ONNX graphs: 2:4, any N:M and unstructured, with I-OBS.

The public names are loaded when they are first used: `inspect` needs neither torch nor ONNX
Runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iobs_onnx.inspection import Inspection, inspect
    from iobs_onnx.layer import Solution, solve_layer
    from iobs_onnx.pruning.pipeline import PruneResult, prune
    from iobs_onnx.report.record import PruneReport
    from iobs_onnx.sparsity import NM, Unstructured
    from iobs_onnx.timing import Bench, bench
    from iobs_onnx.verification import Verification, verify

_HOMES = {
    "Bench": "timing",
    "bench": "timing",
    "Inspection": "inspection",
    "inspect": "inspection",
    "Solution": "layer",
    "solve_layer": "layer",
    "PruneResult": "pruning.pipeline",
    "prune": "pruning.pipeline",
    "PruneReport": "report.record",
    "NM": "sparsity",
    "Unstructured": "sparsity",
    "Verification": "verification",
    "verify": "verification",
}

__all__ = [
    "NM",
    "Bench",
    "Inspection",
    "PruneReport",
    "PruneResult",
    "Solution",
    "Unstructured",
    "Verification",
    "bench",
    "inspect",
    "prune",
    "solve_layer",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"iobs_onnx.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
