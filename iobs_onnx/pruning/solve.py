"""The first stage of a segment: make its sites sparse, and measure what each one cost."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import torch

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import IobsError
from iobs_onnx.hessian import Hessian, combine, dead_inputs, filled
from iobs_onnx.layer import Solution, solve_stacked
from iobs_onnx.passes import Codes, Surroundings, why_not_integers
from iobs_onnx.pruning.aim import Stored, Tensors, aim, bounded, centred, compensated_bias, matrices
from iobs_onnx.pruning.records import Measurements, SolvedSite
from iobs_onnx.pruning.rounding import round_site
from iobs_onnx.pruning.stages import Proposal, Tasks, Work
from iobs_onnx.site import Site, Tap
from iobs_onnx.solvers import make_solver
from iobs_onnx.solvers.quadratic import squared_norm
from iobs_onnx.sparsity import Pattern

_Solved: TypeAlias = dict[Site, SolvedSite]


@dataclass(frozen=True)
class Solve:
    """Solves sites; those that read the same taps are stacked, and share one factorisation.

    Each aims at `f(W) = ½ E‖W_dense x_d + (r_d − r_s) − W x_s‖²`, with the residual where the
    output is added to a stream, unless making up for it would change the output by more than it
    is. With bias compensation `b` the bias takes over that fraction of
    the mean error, and the rest is solved with `H − b μμᵀ`, μ the mean of `x_s`. Under `quantize`
    what is kept is rounded, unless it is to be trained. Sites that no row reached are left out.
    """

    name: str = "solve"

    def run(self, work: Work, advance: Callable[[], None]) -> Proposal:
        """Solve the segment's sites."""
        together: dict[tuple[tuple[Tap, ...], Pattern], list[Site]] = defaultdict(list)
        for site in work.segment.sites:
            together[site.taps, work.run.patterns[site]].append(site)

        def solve(group: tuple[tuple[tuple[Tap, ...], Pattern], list[Site]]) -> _Solved:
            (taps, pattern), members = group
            if not (reached := [work.hessians[tap] for tap in taps if tap in work.hessians]):
                return {}  # they are in a body that never ran
            tensors = {site: _tensors(site, work) for site in members}
            hessian = filled(combine(reached))
            problem = _Stacked(tensors, hessian, pattern, work.run.config, work.tasks)
            try:
                return problem.solved(work.run.device)
            except IobsError as error:
                raise type(error)(f"site {members[0].name!r}: {error}") from error

        solved: _Solved = {}
        found = work.tasks.each(solve, together.items())
        for members, sites in zip(together.values(), found, strict=True):
            solved |= sites
            for _ in members:
                advance()
        return Proposal(solved)


def _tensors(site: Site, work: Work) -> Tensors:
    dense = work.stored[site.initializer].tensor.numpy()
    before = work.start.get(site)
    around = work.surroundings.get(site, Surroundings())
    beside = work.segment.beside.get(site)
    return Tensors(
        dense,
        dense if before is None else before.weight.numpy(),
        None if around.bias is None else work.stored[around.bias].tensor.numpy(),
        None if beside is None else work.residuals.get((site.taps[-1], beside)),
    )


@dataclass(frozen=True)
class _Stacked:
    """Sites that share one Hessian and one pattern."""

    tensors: Mapping[Site, Tensors]
    hessian: Hessian
    pattern: Pattern
    config: PruneConfig
    tasks: Tasks

    @property
    def whole(self) -> bool:
        """Whether the pattern keeps every weight."""
        return self.pattern.density == 1.0

    @property
    def rounds(self) -> bool:
        """Whether what is kept is rounded now; what is trained is rounded afterwards."""
        return self.config.quantize is not None and self.config.distill == "none"

    @property
    def biased(self) -> bool:
        """Whether a mean is left to biases: only where every site of the tap has one."""
        return not self.whole and all(item.bias is not None for item in self.tensors.values())

    def solved(self, device: torch.device) -> dict[Site, SolvedSite]:
        """Aim, solve, round, measure, and move the biases."""
        config = self.config
        moments = centred(self.hessian, config.bias_compensation if self.biased else 0.0)
        dense = [matrices(site, item.dense, device) for site, item in self.tensors.items()]
        around = [
            item if self.whole else bounded(weight, item, moments, config)
            for weight, item in zip(dense, self.tensors.values(), strict=True)
        ]
        aims = [
            aim(weight, site, item, moments, config, whole=self.whole)
            for weight, site, item in zip(dense, self.tensors, around, strict=True)
        ]
        started = time.perf_counter()
        solutions = self._solve(aims, moments, config.solver, config.preset)
        seconds = time.perf_counter() - started
        other = self._solve(aims, moments, config.compare) if config.compare else None
        outputs = sum(site.out_features for site in self.tensors)
        result = {}
        for index, (site, item) in enumerate(self.tensors.items()):
            stored, codes, nearest = self._stored(site, solutions[index], aims[index], moments)
            sparse = matrices(site, stored, device)  # as it is read: rounded to the stored type
            measured = Measurements(
                pattern=str(self.pattern),
                excess=squared_norm(sparse - aims[index], moments.matrix),
                energy=squared_norm(dense[index], self.hessian.matrix),
                compared=sum(s.excess for s in other[index]) if other else None,
                quantized=(why_not_integers(site) or "int8") if self.rounds else None,
                nearest=None
                if nearest is None
                else squared_norm(matrices(site, nearest, device) - aims[index], moments.matrix),
                bias_compensated=self.biased and config.bias_compensation > 0,
                residual_left_out=around[index] is not item,
                rows=self.hessian.rows,
                dead_inputs=int(dead_inputs(self.hessian.matrix).sum()),
                thin_groups=self.hessian.thin_groups,
                seconds=seconds * site.out_features / outputs,
            )
            bias = self._bias(around[index], dense[index], sparse)
            result[site] = SolvedSite(_tensor(stored), bias, codes, measured)
        return result

    def _bias(
        self, tensors: Tensors, dense: torch.Tensor, sparse: torch.Tensor
    ) -> ir.TensorProtocol | None:
        if not self.biased:
            return None
        found = compensated_bias(dense, sparse, tensors, self.hessian, self.config)
        return None if found is None else _tensor(found)

    def _solve(
        self, aims: Sequence[torch.Tensor], hessian: Hessian, solver: str, preset: str | None = None
    ) -> list[list[Solution[torch.Tensor]]]:
        """Return the solutions of each site, one a group."""

        def solve(group: int) -> list[Solution[torch.Tensor]]:
            return solve_stacked(
                [weight[group] for weight in aims],
                hessian.matrix[group],
                pattern=self.pattern,
                solver=make_solver(solver, preset),
                damping=self.config.damping,
                solve=self.tasks.solve,
            )

        by_group = self.tasks.each(solve, range(len(hessian.matrix)))
        return [list(groups) for groups in zip(*by_group, strict=True)]

    def _stored(
        self,
        site: Site,
        groups: Sequence[Solution[torch.Tensor]],
        wanted: torch.Tensor,
        hessian: Hessian,
    ) -> tuple[Stored, Codes | None, Stored | None]:
        """Return the tensor to store, its integers, and what plain rounding would have stored."""
        dense = self.tensors[site].dense
        if self.rounds and why_not_integers(site) is None:
            codes, nearest = round_site(
                site, groups, wanted, hessian, self.config.damping, dense.dtype
            )
            return codes.dequantized(), codes, nearest.dequantized()
        if self.whole:
            # Float64 weights would come back rounded where nothing was asked of them.
            return dense, None, None
        solved = torch.stack([solution.weight for solution in groups])
        return site.to_stored(solved.cpu().numpy(), dense.dtype), None, None


def _tensor(array: Stored) -> ir.TensorProtocol:
    return ir.Tensor(np.ascontiguousarray(array))
