"""What passes between the parts of a run: what all of it shares, and what becomes of a site."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch

from iobs_onnx.config import PruneConfig
from iobs_onnx.engine import Engine
from iobs_onnx.passes import Codes, load_model, rewrite, rewrite_biases, stored_slots
from iobs_onnx.report.site_report import SiteReport
from iobs_onnx.runtime import Data
from iobs_onnx.site import Site
from iobs_onnx.sparsity import Pattern


@dataclass(frozen=True)
class Run:
    """What all parts of a run share.

    Attributes:
        dense: the target; unchanged.
        sites: to prune, each to its pattern in `patterns`.
        patterns: of every site.
        data: to calibrate on, and to judge by.
        config: the options.
        engine: where models run.
        device: where Hessians are summed and layers solved.
    """

    dense: ir.Model
    sites: Sequence[Site]
    patterns: Mapping[Site, Pattern]
    data: Data
    config: PruneConfig
    engine: Engine
    device: torch.device


@dataclass(frozen=True)
class Measurements:
    """What a solved site cost; `ΔW` is its distance from the aim, all on the calibration data.

    Attributes:
        pattern: as text.
        excess: `tr(ΔW H ΔWᵀ)` of the weight as it is stored.
        energy: `tr(W H Wᵀ)` of the dense weight.
        compared: `excess` of the solver named by `compare`; None if none was.
        quantized: `int8`, or why the weight was not rounded; None where it was not asked for.
        nearest: `excess`, had each kept weight been rounded to the nearest; None where none was.
        bias_compensated: whether the bias makes up for a part of the mean error.
        residual_left_out: whether the stream beside was left out of the aim, its error too large.
        rows: tokens or patches in the Hessian.
        dead_inputs: inputs that were zero in every row.
        thin_groups: matrices that met fewer rows than they have inputs, where rows are dealt out.
        seconds: share of the time to solve the sites that were solved together.
    """

    pattern: str
    excess: float
    energy: float
    compared: float | None
    quantized: str | None
    nearest: float | None
    bias_compensated: bool
    residual_left_out: bool
    rows: int
    dead_inputs: int
    thin_groups: int
    seconds: float

    @property
    def layer_error(self) -> float:
        """`tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)`; 0 where the denominator is 0."""
        return self._relative(self.excess)

    def _relative(self, excess: float) -> float:
        return excess / self.energy if self.energy > 0 else 0.0

    def report(self, site: Site, weight: ir.TensorProtocol) -> SiteReport:
        """Return the site's line of the report; `weight` is its stored tensor as pruned."""
        return SiteReport.of(
            site,
            site.to_matrices(weight.numpy()),
            pattern=self.pattern,
            layer_error=self.layer_error,
            output_bound=math.sqrt(self.excess),
            quantized=self.quantized,
            nearest_error=None if self.nearest is None else self._relative(self.nearest),
            bias_compensated=self.bias_compensated,
            residual_left_out=self.residual_left_out,
            compared_error=None if self.compared is None else self._relative(self.compared),
            rows=self.rows,
            dead_inputs=self.dead_inputs,
            thin_groups=self.thin_groups,
            seconds=self.seconds,
        )


@dataclass(frozen=True)
class SolvedSite:
    """What became of one site; its tensors lie in memory, or on disk once they are recorded.

    Attributes:
        weight: its sparse tensor.
        bias: its new bias, None if it stays.
        codes: the integers that the weight is to be written as, None for none.
        measured: what that cost.
    """

    weight: ir.TensorProtocol
    bias: ir.TensorProtocol | None
    codes: Codes | None
    measured: Measurements

    def report(self, site: Site) -> SiteReport:
        """Return its line of the report, and let go of what was read for it from disk."""
        line = self.measured.report(site, self.weight)
        if isinstance(self.weight, ir.ExternalTensor):
            self.weight.release()
        return line


@dataclass(frozen=True)
class Facts:
    """What the feeds turned out to be.

    Attributes:
        batches: how many there were.
        padding_excluded: whether rows were left out as padding.
        padding_kept: labels of taps that count padding, because their shape hides it.
        out_of_step: labels of taps that had other shapes in the dense model.
    """

    batches: int = 0
    padding_excluded: bool = False
    padding_kept: list[str] = field(default_factory=list)
    out_of_step: list[str] = field(default_factory=list)

    def joined(self, other: Facts) -> Facts:
        """Return what holds of two segments that read the same feeds."""
        return Facts(
            max(self.batches, other.batches),
            self.padding_excluded or other.padding_excluded,
            list(dict.fromkeys([*self.padding_kept, *other.padding_kept])),
            list(dict.fromkeys([*self.out_of_step, *other.out_of_step])),
        )


def rewrite_sites(model: ir.Model, solved: Mapping[Site, SolvedSite]) -> None:
    """Put solved weights, and the biases that were moved, into a model, in place."""
    rewrite(model, {site.initializer: item.weight for site, item in solved.items()})
    rewrite_biases(model, {s: item.bias for s, item in solved.items() if item.bias is not None})


def with_sites(
    dense: ir.Model,
    solved: Mapping[Site, SolvedSite],
    tensors: Mapping[str, ir.TensorProtocol] | None = None,
) -> ir.Model:
    """Return the model in which these sites are sparse, and all others dense.

    Args:
        dense: the model.
        solved: the sites.
        tensors: other stored tensors to exchange, by name; biases that only a site's compensation
            adds are left out where that site is dense.
    """
    model = load_model(dense)
    rewrite_sites(model, solved)
    if tensors:
        stored = stored_slots(model)
        rewrite(model, {name: tensor for name, tensor in tensors.items() if name in stored})
    return model
