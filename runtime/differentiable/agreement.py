"""Hold the evaluation in torch against ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from iobs_onnx.errors import DataError, ModelError
from iobs_onnx.runtime.data.feeds import Feed
from iobs_onnx.runtime.differentiable.dtypes import TYPES, Precision
from iobs_onnx.runtime.differentiable.evaluator import Evaluator
from iobs_onnx.runtime.session import open_session, run_errors, taken

# Other orders of summation and ONNX Runtime's polynomials for exp and erf leave 1e-7 to 1e-5 in
# deep float32 models; a wrong reading of an operator leaves 1e-2 and more. Half types round each
# value to 5e-4 and 4e-3.
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
_TOLERANCE = 1e-3
# ONNX Runtime's sigmoid and tanh are exact to 1e-7, whatever they give: probabilities that are all
# near zero differ by much of their norm and mean the same.
_FLOOR = 1e-6


@dataclass(frozen=True)
class Difference:
    """How far one float output of the evaluation lies from ONNX Runtime's, over all feeds.

    Attributes:
        name: of the output.
        largest: largest absolute difference of an element.
        relative: `‖y_torch − y_runtime‖_F / ‖y_runtime‖_F`; inf where one is finite and the
            other is not, or where the shapes differ.
        tolerance: the relative difference that still counts as agreement.
    """

    name: str
    largest: float
    relative: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether it is within the tolerance, or no element differs by more than 1e-6."""
        return self.relative <= self.tolerance or self.largest <= _FLOOR


@dataclass(frozen=True)
class Agreement:
    """What :func:`agreement` found: one item for each float output."""

    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        """Whether every output is within its tolerance."""
        return not self.reason

    @property
    def reason(self) -> str:
        """One line that names the first output beyond its tolerance; empty if there is none."""
        for one in self.differences:
            if not one.ok:
                return (
                    f"output {one.name!r} differs from ONNX Runtime's by {one.relative:.1e} of its "
                    f"norm, more than {one.tolerance:g} (largest difference {one.largest:.1e})"
                )
        return ""


def agreement(
    model: ir.Model,
    feeds: Iterable[Feed],
    *,
    evaluator: Evaluator | None = None,
    precision: Precision = "own",
    tolerance: float | None = None,
) -> Agreement:
    """Run a model in ONNX Runtime on the CPU and in torch, and compare its float outputs.

    Args:
        model: a model that :func:`unsupported` has nothing against.
        feeds: at least one.
        evaluator: of this model, where there is one already.
        precision: for a new evaluator.
        tolerance: relative error of an output that counts as agreement: 1e-3 by default, 2e-2
            where a constant or the output is float16 and 1e-1 where one is bfloat16. A model that
            rounds its activations to integers needs more: values that differ by 1e-7 are rounded
            apart, and each block widens the difference (ResNet-20 in eight bits 6e-3, MiniLM 1e-1,
            a third of what rounding costs the model).

    Raises:
        ModelError: one of the two cannot run the model.
        DataError: there are no feeds.
    """
    evaluator = evaluator or Evaluator(model, precision=precision)
    session = open_session(model, "cpu")
    names = [output.name for output in session.get_outputs()]
    halves = {TYPES.get(v.dtype) for v in model.graph.initializers.values() if v.dtype is not None}
    least = max((TOLERANCE.get(dtype, _TOLERANCE) for dtype in halves if dtype), default=_TOLERANCE)
    totals: dict[str, _Total] = {}
    ran = False
    for feed in feeds:
        ran = True
        with run_errors():
            expected = session.run(None, taken(session, feed))
        tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in feed.items()}
        with torch.no_grad():
            found = evaluator(tensors, outputs=names)
        for name, array in zip(names, expected, strict=True):
            reference = torch.from_numpy(np.asarray(array))
            if reference.is_floating_point():
                totals.setdefault(name, _Total(reference.dtype)).add(reference, found[name])
    if not ran:
        raise DataError("there are no feeds to compare the evaluation with ONNX Runtime on")
    if not totals:
        raise ModelError("the model has no float output to compare with ONNX Runtime's")
    return Agreement(tuple(total.result(name, tolerance, least) for name, total in totals.items()))


class _Total:
    """Running sums over feeds, float64."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._largest = self._difference = self._norm = 0.0

    def add(self, reference: Tensor, found: Tensor) -> None:
        if reference.shape != found.shape:
            self._largest = self._difference = inf
            return
        a, b = reference.double(), found.detach().cpu().double()
        same = (a == b) | (a.isnan() & b.isnan())  # infinities minus themselves are no numbers
        difference = torch.where(same, 0.0, a - b).abs()
        difference = torch.where(difference.isfinite(), difference, inf)
        self._largest = max(self._largest, float(difference.max()) if difference.numel() else 0.0)
        self._difference += float(difference.square().sum())
        self._norm += float(torch.where(a.isfinite(), a, 0.0).square().sum())

    def result(self, name: str, tolerance: float | None, least: float) -> Difference:
        relative = inf if self._difference else 0.0
        if self._norm > 0:
            relative = sqrt(self._difference / self._norm)
        if tolerance is None:
            tolerance = max(least, TOLERANCE.get(self._dtype, _TOLERANCE))
        return Difference(name, self._largest, relative, tolerance)
