"""Combinatorial Brain Surgeon: swap kept and removed weights while that lowers the quadratic.

Yu, Serra, Ramalingam, Zhe: "The Combinatorial Brain Surgeon: Pruning Weights That Cancel One
Another in Neural Networks", ICML 2022, algorithm 1. Differences:

1. The paper swaps by the quadratic with the kept weights as they are (CBS-S) and updates them
   once afterwards (CBS-U). Here a swap is judged by the quadratic after the update, exactly.
2. The search begins at another solver's support, not at random ones.
3. The best swap is made even where it is uphill, and what has moved may not move again for a
   while (Glover: "Tabu Search", ORSA Journal on Computing 1, 1989), so that the search leaves
   local optima; each output keeps the best support it has passed.
4. Weights are swapped within a group (N:M) or within an output (unstructured). The unstructured
   budget moves between outputs too: each also remembers its best supports with one weight more
   and one less, and :func:`allocate` chooses.
5. Where there are few supports all of them are tried.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from iobs_onnx.solvers.allocate import allocate
from iobs_onnx.solvers.exhaustive import all_supports, exhaustive
from iobs_onnx.solvers.problem import Problem, Solver, Sparse
from iobs_onnx.solvers.quadratic import quadratic
from iobs_onnx.solvers.refit import refitted
from iobs_onnx.solvers.sparsegpt import SparseGPT
from iobs_onnx.solvers.tableau import Tableaux, rows_at_once
from iobs_onnx.sparsity import NM


@dataclass(frozen=True)
class CBS:
    """Tabu search by swaps from the support of another solver; never worse than its refit.

    Time `½ in³` multiply-adds a row to set up and `2 in²` a swap and row, in chunks of rows that
    take 128 MiB.

    Attributes:
        start: the solver whose support is improved.
        swaps: most swaps of each row.
        tenure: swaps for which a weight that moved stays where it is. 0: only swaps that
            lower the error by more than `gain` are made, and a row ends when there is none.
        gain: least gain of a swap, as a fraction of the row's error; only for tenure 0.
        candidates: removed weights of an output tried against every kept one, best gain
            first; only for unstructured patterns, N:M tries every pair of a group.
        widest: layers of more inputs keep the support of the start; None: none do.
        tiny: with no more supports an output than this, all are tried instead.
        tolerance: relative gradient on the support at which the refit ends.
    """

    start: Solver = field(default_factory=SparseGPT)
    swaps: int = 96
    tenure: int = 10
    gain: float = 1e-4
    candidates: int = 8
    widest: int | None = None
    tiny: int = 512
    tolerance: float = 1e-4

    def solve(self, problem: Problem) -> Sparse:
        """Return the improved support and the optimal weights on it."""
        supports = all_supports(problem.pattern, problem.weight.shape[1], self.tiny)
        if supports is not None:
            return refitted(problem, exhaustive(problem, supports), self.tolerance)
        first = self.start.solve(problem).mask
        if self.widest is not None and first.shape[1] > self.widest:
            return refitted(problem, first, self.tolerance)
        rows = rows_at_once(first.shape[1])
        found = [
            self._search(problem, weight, mask)
            for weight, mask in zip(problem.weight.split(rows), first.split(rows), strict=True)
        ]
        errors, masks = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        chosen = allocate(errors, masks.sum(2), problem.blocks)
        mask = masks[chosen, torch.arange(len(first), device=first.device)]
        before, after = (refitted(problem, kept, self.tolerance) for kept in (first, mask))
        # The search rounds, so what it gained is measured.
        better = _block_errors(problem, after.weight) < _block_errors(problem, before.weight)
        return Sparse(*(torch.where(better, a, b) for a, b in zip(after, before, strict=True)))

    def _search(
        self, problem: Problem, weight: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the best errors of some rows, `(options, rows)`, and their masks."""
        state = _at(problem, weight, mask)
        pattern = problem.pattern
        if isinstance(pattern, NM):
            pairs: _Pairs = _GroupPairs(state, pattern.m)
        else:
            pairs = _RowPairs(state, min(self.candidates, weight.shape[1]))
        # Twice the quadratic is wᵀHw less what the kept weights explain of it.
        target = weight @ problem.damped
        error = (target * (weight - state.y.where(mask, 0.0))).sum(1)
        best = _Best(state, error, neighbours=not isinstance(pattern, NM))
        free = torch.zeros_like(mask, dtype=torch.int32)  # the swap at which each may move again
        for step in range(self.swaps):
            change, out, back = pairs.best(free <= step)
            active = change.isfinite() if self.tenure else change < -self.gain * error
            if not bool(active.any()):
                break
            for which in (back, out):
                pairs.follow(*state.move(which, active))
                free.scatter_(1, which[:, None], step + 1 + self.tenure)
            error = torch.where(active, error + change, error)
            best.update(error)
        return best.errors, best.masks


class _Best:
    """The best support of each row so far, and with `neighbours` those of one weight more or less.

    Attributes:
        errors: `(options, rows)`, twice the quadratic.
        masks: `(options, rows, in)`.
    """

    def __init__(self, state: Tableaux, error: torch.Tensor, *, neighbours: bool) -> None:
        self._state = state
        self._neighbours = neighbours
        options = 3 if neighbours else 1
        self.errors = error.new_full((options, len(error)), torch.inf)
        self.masks = state.kept.expand(options, *state.kept.shape).clone()
        self.update(error)

    def update(self, error: torch.Tensor) -> None:
        """Compare with the state, whose rows have this error."""
        self._keep(0, error, None)
        if self._neighbours:
            worth = self._state.y.square() / self._state.diagonal  # negative where kept
            gain, more = worth.masked_fill(self._state.kept, -torch.inf).max(1)
            cost, less = worth.masked_fill(~self._state.kept, -torch.inf).max(1)
            self._keep(1, error - gain, more)
            self._keep(2, error - cost, less)

    def _keep(self, option: int, error: torch.Tensor, flipped: torch.Tensor | None) -> None:
        rows = (error < self.errors[option]).nonzero().squeeze(1)
        self.errors[option, rows] = error[rows]
        masks = self._state.kept[rows]
        if flipped is not None:
            at = flipped[rows, None]
            masks.scatter_(1, at, ~masks.gather(1, at))
        self.masks[option, rows] = masks


def _at(problem: Problem, weight: torch.Tensor, mask: torch.Tensor) -> Tableaux:
    """Return the tableaux of rows with these kept sets, from the nearer end."""
    if 2 * int(mask.sum()) > mask.numel():
        state, moving = Tableaux(-problem.inverse, weight), ~mask
    else:
        state, moving = Tableaux(problem.damped, weight @ problem.damped), mask
    counts = moving.sum(1)
    order = moving.byte().argsort(dim=1, descending=True, stable=True)
    for step in range(int(counts.max())):
        state.move(order[:, step], counts > step)
    return state


class _Pairs(Protocol):
    def best(self, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return each row's best swap: its change, the weight to remove, the one to bring back.

        Only weights that are `free`, `(rows, in)` bool, take part; the change is infinite where
        no swap is left.

        Bringing j back changes twice the quadratic by `−y_j² / T_jj`, and then removing i by
        `−y_i'² / T_ii'` with `y_i' = y_i − T_ij y_j / T_jj` and `T_ii' = T_ii − T_ij² / T_jj`.
        """
        ...

    def follow(self, change: torch.Tensor, sign: torch.Tensor) -> None:
        """Take note of what :meth:`Tableaux.move` returned."""
        ...


class _GroupPairs:
    """All pairs within each group of `size` inputs; the blocks of `T` they need are kept."""

    def __init__(self, state: Tableaux, size: int) -> None:
        self._state = state
        self._blocks = state.blocks(size)

    def best(self, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        size = self._blocks.shape[-1]
        y = self._state.y.unflatten(1, (-1, size))
        diagonal = self._state.diagonal.unflatten(1, (-1, size))
        out = (self._state.kept & free).unflatten(1, (-1, size))
        back = (~self._state.kept & free).unflatten(1, (-1, size))
        across = self._blocks / diagonal[:, :, None]
        others = y[..., None] - across * y[:, :, None]
        pivots = diagonal[..., None] - across * self._blocks
        changes = -(y.square() / diagonal)[:, :, None] - others.square() / pivots
        changes.masked_fill_(~(out[..., None] & back[:, :, None]), torch.inf)
        change, pair = changes.flatten(1).min(1)
        group, pair = pair // size**2, pair % size**2
        return change, group * size + pair // size, group * size + pair % size

    def follow(self, change: torch.Tensor, sign: torch.Tensor) -> None:
        parts = change.unflatten(1, (-1, self._blocks.shape[-1]))
        self._blocks -= (parts * sign[..., None])[..., None] * parts[:, :, None]


class _RowPairs:
    """The `count` removed weights of most gain, each with every kept one of its row."""

    def __init__(self, state: Tableaux, count: int) -> None:
        self._state = state
        self._count = count

    def best(self, free: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, diagonal = self._state.y, self._state.diagonal
        kept = self._state.kept
        gains = (y.square() / diagonal).masked_fill(kept | ~free, -torch.inf)
        gain, back = gains.topk(self._count, dim=1)
        columns = self._state.columns(back)
        across = columns / diagonal.gather(1, back)[..., None]
        others = y[:, None] - across * y.gather(1, back)[..., None]
        pivots = diagonal[:, None] - across * columns
        changes = -gain[..., None] - others.square() / pivots
        # A row may have fewer than `count` weights to bring back.
        changes.masked_fill_(~(kept & free)[:, None] | gain.isneginf()[..., None], torch.inf)
        change, pair = changes.flatten(1).min(1)
        inputs = y.shape[1]
        returning = back.gather(1, pair[:, None] // inputs).squeeze(1)
        return change, pair % inputs, returning

    def follow(self, change: torch.Tensor, sign: torch.Tensor) -> None:
        """Nothing is kept between swaps."""


def _block_errors(problem: Problem, weight: torch.Tensor) -> torch.Tensor:
    """Return twice the quadratic of each stacked site, on each of its rows, `(out, 1)`."""
    errors = quadratic(weight - problem.weight, problem.damped)
    parts = errors[:, None].split(problem.blocks)
    return torch.cat([part.sum().expand_as(part) for part in parts])
