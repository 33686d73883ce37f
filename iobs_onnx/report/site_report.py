"""The line of the report that tells of one pruned site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.inspection import describe
from iobs_onnx.passes import achieved_sparsity
from iobs_onnx.report.mask_picture import MaskPicture
from iobs_onnx.site import Site


@dataclass(frozen=True)
class SiteReport:
    """One pruned site; the fields that `inspect` shows, and what pruning did to it.

    Attributes:
        pattern: as text.
        sparsity: fraction of weights that are zero.
        layer_error: `tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)` on the calibration data, `ΔW` the distance from
            the aim; what a compensated bias takes over does not count.
        output_bound: `√tr(ΔW H ΔWᵀ)`, the root mean square change of the output vector.
        quantized: `int8`, or why it was not; None where it was not asked for.
        nearest_error: `layer_error`, had each kept weight been rounded to the nearest instead.
        bias_compensated: whether the bias was moved to make up for the mean error.
        residual_left_out: whether the error of the stream that the output is added to was left out
            of the aim, because making up for it would change the output by more than it is.
        compared_error: the same for the solver named by `compare`, None if none was.
        error_ratio: `layer_error / compared_error`.
        rows: tokens or patches in the Hessian.
        dead_inputs: inputs that were zero in every row.
        thin_groups: matrices that met fewer rows than they have inputs, where an index deals rows
            out to a stack of them (experts): rows of the kind that the others met fill them up.
        seconds: share of the time to solve the sites that were solved together.
        mask: a small picture of which weights are kept.
    """

    name: str
    nodes: list[str]
    op_type: str
    initializer: str
    shape: list[int]
    dtype: str
    axis: int
    groups: int
    out_features: int
    in_features: int
    taps: list[str]
    eligible_2_4: bool
    eligibility_rule: str
    engines: list[dict[str, Any]]
    pattern: str
    sparsity: float
    layer_error: float
    output_bound: float
    quantized: str | None
    nearest_error: float | None
    bias_compensated: bool
    residual_left_out: bool
    compared_error: float | None
    error_ratio: float | None
    rows: int
    dead_inputs: int
    thin_groups: int
    seconds: float
    mask: MaskPicture

    @classmethod
    def of(
        cls,
        site: Site,
        weight: NDArray[np.float32],
        *,
        pattern: str,
        layer_error: float,
        output_bound: float,
        quantized: str | None = None,
        nearest_error: float | None = None,
        bias_compensated: bool,
        residual_left_out: bool = False,
        compared_error: float | None,
        rows: int,
        dead_inputs: int,
        thin_groups: int = 0,
        seconds: float,
    ) -> SiteReport:
        """Describe a solved site; `weight` holds the numbers that its stored tensor stands for."""
        return cls(
            **describe(site),
            pattern=pattern,
            sparsity=achieved_sparsity(weight),
            layer_error=layer_error,
            output_bound=output_bound,
            quantized=quantized,
            nearest_error=nearest_error,
            bias_compensated=bias_compensated,
            residual_left_out=residual_left_out,
            compared_error=compared_error,
            error_ratio=layer_error / compared_error if compared_error else None,
            rows=rows,
            dead_inputs=dead_inputs,
            thin_groups=thin_groups,
            seconds=seconds,
            mask=MaskPicture.of(weight),
        )
