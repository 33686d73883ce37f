"""Judge a sparse model by what calibration has not seen: held-out feeds, or the user's metric."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from iobs_onnx.engine import Engine, compare
from iobs_onnx.errors import CheckError, DataError, GateError, InputError, OptionError
from iobs_onnx.passes import save_model
from iobs_onnx.report.outputs import judged
from iobs_onnx.runtime import NEVER_FINITE, Data, OutputFidelity, find_callable

Metric = Callable[[str], float]


@dataclass(frozen=True)
class Verdict:
    """What a model is worth.

    Attributes:
        outputs: how near each output comes to the dense model's on held-out feeds.
        error: mean of the errors (`counted`) of those that are no caches; None without held-out
            feeds.
        metric: the user's, higher is better; None without one.
    """

    outputs: list[OutputFidelity]
    error: float | None
    metric: float | None

    def better_than(self, other: Verdict) -> bool:
        """Whether the metric is higher or, without one, the error lower."""
        if self.metric is not None and other.metric is not None:
            return self.metric > other.metric
        return self.error is not None and other.error is not None and self.error < other.error


@dataclass(frozen=True)
class Judge:
    """Runs a sparse model beside the dense one.

    Attributes:
        dense: what it is compared with.
        data: its held-out feeds are read anew for every model.
        engine: where models run.
        metric: of the user; None for none.
    """

    dense: ir.Model
    data: Data
    engine: Engine
    metric: Metric | None = None

    def outputs(self, sparse: ir.Model) -> list[OutputFidelity]:
        """Compare outputs on the held-out feeds; nothing where there are none.

        Raises:
            CheckError: the sparse model puts out values that are not finite.
            DataError: so does the dense model.
        """
        if not self.data.held_out_samples:
            return []
        found = compare(self.dense, sparse, self.data.held_out, self.engine)
        if broken := [output for output in found if not output.finite]:
            output = broken[0]
            if output.note == NEVER_FINITE:
                raise DataError(
                    f"output {output.name!r} is not finite on held-out feeds, in the dense model "
                    "either; give other data, or mend the model"
                )
            why = f" ({output.note})" if output.note else ""
            raise CheckError(
                f"output {output.name!r} of the sparse model is not finite on held-out "
                f"feeds{why}; nothing was written"
            )
        return found

    def __call__(self, sparse: ir.Model) -> Verdict:
        """Judge a model.

        Raises:
            CheckError: its outputs, or the metric's value, are not finite.
        """
        outputs = self.outputs(sparse)
        errors = [output.counted for output in _judged(outputs)]
        error = sum(errors) / len(errors) if errors else None
        return Verdict(outputs, error, None if self.metric is None else self.measure(sparse))

    def measure(self, model: ir.Model) -> float:
        """Return the user's metric of a model."""
        assert self.metric is not None, "only where there is one"
        with TemporaryDirectory(dir=self.engine.folder) as folder:
            file = Path(folder, "model.onnx")
            save_model(model, file)
            value = float(self.metric(os.fspath(file)))
        if not math.isfinite(value):
            raise CheckError(f"the metric gave {value} for the pruned model; nothing was written")
        return value


def _judged(outputs: Sequence[OutputFidelity]) -> list[OutputFidelity]:
    names = judged([output.name for output in outputs])
    return [output for output in outputs if output.name in names]


def find_metric(metric: str | Metric | None) -> Metric | None:
    """Return the function that `module:callable` names; a function is returned as it is.

    Raises:
        OptionError: it cannot be imported.
    """
    if not isinstance(metric, str):
        return metric
    try:
        return find_callable(metric)
    except (InputError, ImportError, ValueError) as error:
        raise OptionError(
            f"metric {metric!r}: expected module:callable, which can be imported ({error})"
        ) from error


def require_output_error(outputs: Sequence[OutputFidelity], bound: float | None) -> None:
    """Hold the relative error of every output that is no cache to a bound; None for none.

    Raises:
        DataError: there is a bound, and no sample was held out.
        GateError: an output is further from the dense model's than that.
    """
    if bound is None:
        return
    if not outputs:
        raise DataError(
            f"max_output_error {bound}: the data leave no sample to hold out; give more"
        )
    worst = max(_judged(outputs), key=lambda output: output.counted)
    # Not `>`: an error that is NaN must not pass.
    if not worst.counted <= bound:
        note = f" ({worst.note}; a feed left out counts as 1)" if worst.note else ""
        raise GateError(
            f"output {worst.name!r}: relative error {worst.counted:.4g} on held-out samples{note} "
            f"exceeds max_output_error {bound:g}; nothing was written"
        )
