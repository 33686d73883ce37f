"""Where an activation is not finite: whether the model or the pruning is at fault.

The data are not: inputs that hold NaN or Inf are refused where they are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.errors import CheckError, DataError, IobsError
from iobs_onnx.passes import outputs_out_of_reach
from iobs_onnx.pruning.records import Run
from iobs_onnx.runtime import Feed, NotFinite


def explained(
    error: NotFinite, run: Run, model: ir.Model, feeds: Iterable[Feed | tuple[Feed, float]]
) -> IobsError:
    """Say what is at fault, by what the whole dense model computes on the same batch.

    Args:
        error: names the activation and the batch.
        run: whose sites may be left out.
        model: the dense model with every value that taps read.
        feeds: as they were measured on, from the first.

    Returns:
        A DataError where the model cannot compute these data or nobody can tell, a CheckError where
        the whole dense model is finite at that activation.
    """
    item = next(islice(feeds, error.batch, None), None)
    if item is None:
        return DataError(
            f"{error}; these data are read once: give them as arrays or files to learn whether the "
            "whole model has it too"
        )
    feed = item[0] if isinstance(item, tuple) else item
    unknown = outputs_out_of_reach(model)
    outputs = [value.name or "" for value in model.graph.outputs if value.name not in unknown]
    found = run.engine.whole(model, [error.value, *outputs], feed)
    if found is None:
        return DataError(
            f"{error}; the whole model exceeds the memory budget: raise that to learn whether it "
            "has it too"
        )
    broken = [name for name in outputs if not _finite(found[name])]
    if _finite(found[error.value]):
        return CheckError(
            f"{error}; the whole dense model is finite there, so neither it nor the data are at "
            "fault but what was pruned before, or the cut into segments: use sequential none"
        )
    if not broken:
        sites = [site.name for site in run.sites if error.value in {t.value for t in site.taps}]
        return DataError(
            f"{error}; the whole model has it too, and its outputs are finite all the same: "
            f"exclude {', '.join(repr(name) for name in sites)}"
        )
    return DataError(
        f"{error}; output {broken[0]!r} of the whole dense model is not finite either, on inputs "
        "that are: the model overflows on these data; give others, or mend the model"
    )


def _finite(array: NDArray[np.generic]) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())
