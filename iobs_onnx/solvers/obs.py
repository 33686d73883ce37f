"""Optimal Brain Surgeon: remove the weight that costs least, make up for it, again.

Hassibi, Stork: "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", NIPS
1992, equation 5: removing weight p of a row costs `½ w_p² / [H⁻¹]_pp` and moves the others by
`−(w_p / [H⁻¹]_pp) H⁻¹ e_p`. The unstructured budget is spent as in Frantar, Singh, Alistarh:
"Optimal Brain Compression", NeurIPS 2022, algorithms 1 and 2: every row is traced to its end
alone, then the cheapest removals of all traces are taken. Differences from the published code:

1. `H⁻¹` of a row is not changed after each removal, but by matrix products of 32 at a time,
   and only for the inputs that can still be removed.
2. A trace's costs are compared by their running maximum, so that the chosen removals are
   always the beginning of each trace, even where a cost falls on the way.
3. Weights come from an exact refit on the final support, without the rounding of a trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from iobs_onnx.errors import SolverError
from iobs_onnx.solvers.eigenspace import Eigenspace, LowRankRows
from iobs_onnx.solvers.problem import Problem, Sparse
from iobs_onnx.solvers.refit import refitted
from iobs_onnx.solvers.tableau import WIDTH, Tableaux, rows_at_once
from iobs_onnx.sparsity import NM


@dataclass(frozen=True)
class OBS:
    """Greedy removal with exact compensation, one weight at a time, rows side by side.

    Time `in³ / 3` multiply-adds a row (`in³ / 6` for 2:4), in chunks of rows that take
    128 MiB; with `rank` r it is `in² r` (`½ in² r`) and one eigendecomposition.

    Attributes:
        rank: choose by the `rank` largest eigenvalues of `H` and the diagonal of the rest;
            None for the whole of `H`. The weights are refitted with the whole in either case.
        tolerance: relative gradient on the support at which the refit ends.
    """

    rank: int | None = None
    tolerance: float = 1e-4

    def solve(self, problem: Problem) -> Sparse:
        """Return the greedy support and the optimal weights on it."""
        if self.rank is None:
            base = -problem.inverse
            rows = rows_at_once(problem.weight.shape[1])
            trace = _trace(problem, rows, lambda weight: _ExactRows(base, weight))
        else:
            space = Eigenspace(problem, self.rank)
            rows = max(1, _LOW_RANK_ELEMENTS // problem.weight.shape[1])
            trace = _trace(problem, rows, lambda weight: LowRankRows(space, weight))
        return refitted(problem, _choose(problem, *trace), self.tolerance)


class _Rows(Protocol):
    @property
    def index(self) -> torch.Tensor: ...

    @property
    def costs(self) -> torch.Tensor: ...

    def remove(self, which: torch.Tensor) -> None: ...

    def forget(self, candidates: torch.Tensor) -> torch.Tensor: ...


class _ExactRows:
    """Rows with the whole inverse Hessian, narrowed to the inputs that can still go."""

    def __init__(self, base: torch.Tensor, weight: torch.Tensor) -> None:
        self._state = Tableaux(base, weight)

    @property
    def index(self) -> torch.Tensor:
        return self._state.index

    @property
    def costs(self) -> torch.Tensor:
        return self._state.y.square() / -self._state.diagonal

    def remove(self, which: torch.Tensor) -> None:
        self._state.move(which)

    def forget(self, candidates: torch.Tensor) -> torch.Tensor:
        self._state.flush()
        width = max(1, int(candidates.sum(1).max()))
        if width > 0.7 * candidates.shape[1]:
            return candidates
        # Rows with fewer candidates than the widest carry some columns along.
        columns = candidates.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
        self._state.narrow(columns)
        return candidates.gather(1, columns)


def _trace(
    problem: Problem, rows: int, begin: Callable[[torch.Tensor], _Rows]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the removals of each row in order, and their costs, both `(out, removals)`."""
    pattern = problem.pattern
    group, spare = (pattern.m, pattern.m - pattern.n) if isinstance(pattern, NM) else (1, 1)
    parts = [_trace_rows(begin(chunk), group, spare) for chunk in problem.weight.split(rows)]
    orders, costs = (torch.cat(part) for part in zip(*parts, strict=True))
    if not bool((costs.isfinite() & (costs >= 0)).all()):
        raise SolverError(
            f"H + λI with λ = {problem.damping:.3g} is too ill-conditioned for OBS in float32: "
            "raise the damping"
        )
    return orders, costs


def _trace_rows(rows: _Rows, group: int, spare: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove `spare` of each `group` consecutive inputs from every row, cheapest first."""
    count, inputs = rows.index.shape
    steps = inputs // group * spare
    order = rows.index.new_empty(count, steps)
    costs = rows.costs.new_empty(count, steps)
    left = rows.index.new_full((count, inputs // group), spare)
    candidates = torch.ones_like(rows.index, dtype=torch.bool)
    for step in range(steps):
        if step and step % WIDTH == 0:
            candidates = rows.forget(candidates)
        cost, which = rows.costs.masked_fill(~candidates, torch.inf).min(1, keepdim=True)
        order[:, step : step + 1] = removed = rows.index.gather(1, which)
        costs[:, step : step + 1] = cost
        rows.remove(which.squeeze(1))
        candidates.scatter_(1, which, False)
        if group > 1:
            left.scatter_add_(1, removed // group, torch.full_like(removed, -1))
            candidates &= left.gather(1, rows.index // group) > 0
    return order, costs


def _choose(problem: Problem, order: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """Return the mask `(out, in)` of what the traces leave."""
    if isinstance(problem.pattern, NM):
        return torch.ones_like(problem.weight, dtype=torch.bool).scatter(1, order, False)
    # Last removal first: of equal scores the first are kept, so a trace is cut only once.
    kept = problem.project(costs.cummax(1).values.flip(1))
    return torch.empty_like(kept).scatter(1, order.flip(1), kept)


# Rows times inputs side by side: small enough for a processor's cache.
_LOW_RANK_ELEMENTS = 2**16
