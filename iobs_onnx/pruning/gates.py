"""Bounds that the caller sets on the result: nothing is written where one does not hold."""

from __future__ import annotations

from collections.abc import Sequence

from iobs_onnx.errors import DataError, GateError
from iobs_onnx.runtime import OutputFidelity


def require_output_error(outputs: Sequence[OutputFidelity], bound: float | None) -> None:
    """Hold the relative error of every output on held-out samples to a bound; None for none.

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
    worst = max(outputs, key=lambda output: output.relative_error)
    # Not `>`: an error that is NaN must not pass.
    if not worst.relative_error <= bound:
        raise GateError(
            f"output {worst.name!r}: relative error {worst.relative_error:.4g} on held-out samples "
            f"exceeds max_output_error {bound:g}; nothing was written"
        )
