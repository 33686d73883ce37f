"""Combinatorial Brain Surgeon: swap kept and removed weights while that lowers the quadratic.

Yu, Serra, Ramalingam, Zhe: "The Combinatorial Brain Surgeon: Pruning Weights That Cancel One
Another in Neural Networks", ICML 2022, algorithm 1. Differences:

1. The paper swaps by the quadratic with the kept weights as they are (CBS-S) and updates them
   once afterwards (CBS-U). Here a swap is judged by the quadratic after the update, exactly.
2. The search begins at another solver's support, not at random ones.
3. Weights are swapped within a group (N:M) or within an output (unstructured). Outputs share
   no term of the quadratic, so that an exchange between two of them is a removal and a return,
   each judged alone; such exchanges are made among the outputs that are searched together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

import iobs_onnx.solvers as solvers  # noqa: PLR0402 - nothing imports from the root
from iobs_onnx.solvers.problem import Problem, Solver, Sparse
from iobs_onnx.solvers.refit import refit
from iobs_onnx.solvers.tableau import Tableaux, rows_at_once
from iobs_onnx.sparsity import NM


@dataclass(frozen=True)
class CBS:
    """Local search by swaps from the support of another solver; never worse than its refit.

    Every swap lowers the quadratic; the search ends at a support that no swap improves by more
    than `gain`.

    Time `in³` multiply-adds a row to set up, then `in²` a swap and row, in chunks of rows that
    take 128 MiB.

    Attributes:
        start: name or instance of the solver whose support is improved.
        gain: a row ends when its best swap lowers its error by less than this fraction.
        swaps: most swaps a row, as a fraction of `in`.
        candidates: removed weights of an output tried against every kept one, best gain
            first; only for unstructured patterns, N:M tries every pair of a group.
        tolerance: relative gradient on the support at which the refit ends.
    """

    start: str | Solver = "sparsegpt"
    gain: float = 1e-4
    swaps: float = 1.0
    candidates: int = 8
    tolerance: float = 1e-4

    def solve(self, problem: Problem) -> Sparse:
        """Return the improved support and the optimal weights on it."""
        first = solvers.make_solver(self.start).solve(problem).mask
        rows = rows_at_once(first.shape[1])
        masks = [
            self._search(problem, weight, mask)
            for block, start in zip(
                problem.weight.split(problem.blocks), first.split(problem.blocks), strict=True
            )
            for weight, mask in zip(block.split(rows), start.split(rows), strict=True)
        ]
        before, after = self._refit(problem, first), self._refit(problem, torch.cat(masks))
        # The search rounds, so what it gained is measured.
        better = _block_errors(problem, after.weight) < _block_errors(problem, before.weight)
        return Sparse(*(torch.where(better, a, b) for a, b in zip(after, before, strict=True)))

    def _refit(self, problem: Problem, mask: torch.Tensor) -> Sparse:
        dense, kept = problem.weight.T.contiguous(), mask.T.contiguous()
        weight = refit(dense, kept, dense, problem.damped, tolerance=self.tolerance)
        return Sparse(weight.T.contiguous(), mask)

    def _search(self, problem: Problem, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the improved masks of some rows."""
        state = _at(problem, weight, mask)
        pattern = problem.pattern
        if isinstance(pattern, NM):
            pairs: _Pairs = _GroupPairs(state, pattern.m)
        else:
            pairs = _RowPairs(state, min(self.candidates, weight.shape[1]))
        # Twice the quadratic is wᵀHw less what the kept weights explain of it.
        target = weight @ problem.damped
        error = (target * (weight - state.y.where(mask, 0.0))).sum(1)
        for _ in range(round(self.swaps * weight.shape[1])):
            change, out, back = pairs.best()
            active = change < -self.gain * error
            if bool(active.any()):
                moves = [back, out]
            elif isinstance(pattern, NM):
                break
            else:
                change, out = _exchange(state, self.gain * float(error.mean()))
                active = change != 0
                if not bool(active.any()):
                    break
                moves = [out]
            for which in moves:
                pairs.follow(*state.move(which, active))
            error = torch.where(active, error + change, error)
        return state.kept


def _exchange(state: Tableaux, least: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose rows that give a weight and rows that get one: most gain with least cost first.

    A pair must gain more than `least`.

    Returns:
        What each row's twice the quadratic changes by, 0 for rows that stay, and its move.
    """
    worth = state.y.square() / state.diagonal
    gains, back = worth.masked_fill(state.kept, -torch.inf).max(1)
    costs, out = worth.neg().masked_fill(~state.kept, torch.inf).min(1)
    change = torch.zeros_like(gains)
    givers = iter(costs.argsort(stable=True).tolist())
    used: set[int] = set()
    for getter in gains.argsort(descending=True, stable=True).tolist():
        if getter in used:
            continue
        giver = next((row for row in givers if row != getter and row not in used), None)
        if giver is None or gains[getter] - costs[giver] <= least:
            break
        used |= {getter, giver}
        change[getter], change[giver] = -gains[getter], costs[giver]
    return change, torch.where(change < 0, back, out)


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
    def best(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return each row's best swap: its change, the weight to remove, the one to bring back.

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

    def best(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        size = self._blocks.shape[-1]
        y = self._state.y.unflatten(1, (-1, size))
        diagonal = self._state.diagonal.unflatten(1, (-1, size))
        kept = self._state.kept.unflatten(1, (-1, size))
        across = self._blocks / diagonal[:, :, None]
        others = y[..., None] - across * y[:, :, None]
        pivots = diagonal[..., None] - across * self._blocks
        changes = -(y.square() / diagonal)[:, :, None] - others.square() / pivots
        changes.masked_fill_(~kept[..., None] | kept[:, :, None], torch.inf)
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

    def best(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y, diagonal = self._state.y, self._state.diagonal
        kept = self._state.kept
        gains = (y.square() / diagonal).masked_fill(kept, -torch.inf)
        gain, back = gains.topk(self._count, dim=1)
        columns = self._state.columns(back)
        across = columns / diagonal.gather(1, back)[..., None]
        others = y[:, None] - across * y.gather(1, back)[..., None]
        pivots = diagonal[:, None] - across * columns
        changes = -gain[..., None] - others.square() / pivots
        changes.masked_fill_(~kept[:, None], torch.inf)
        change, pair = changes.flatten(1).min(1)
        inputs = y.shape[1]
        returning = back.gather(1, pair[:, None] // inputs).squeeze(1)
        return change, pair % inputs, returning

    def follow(self, change: torch.Tensor, sign: torch.Tensor) -> None:
        """Nothing is kept between swaps."""


def _block_errors(problem: Problem, weight: torch.Tensor) -> torch.Tensor:
    """Return twice the quadratic of each stacked site, on each of its rows, `(out, 1)`."""
    delta = weight - problem.weight
    parts = ((delta @ problem.damped) * delta).sum(1, keepdim=True).split(problem.blocks)
    return torch.cat([part.sum().expand_as(part) for part in parts])
