"""I-OBS: proximal Newton search for the support, then an exact refit on it.

The Newton step and projection are those of Wu, Modoranu, Safaryan, Kuznedelev, Alistarh: "The
Iterative Optimal Brain Surgeon", NeurIPS 2024. On a fixed quadratic a plain Newton step lands
on the same dense minimiser every time, so the step is made proximal (alternating direction
method of multipliers, as in Meng, Behdin, Wang, Mazumder: "ALPS", NeurIPS 2024, section 3).
Differences from ALPS:

1. The space is scaled by the OBS saliency, `s_j = ([H⁻¹]_jj)^(-1/2)`, blended with `√H_jj`:
   there the magnitude of a weight is what removing it costs when the others make up for it.
   With `√H_jj` alone the same number of iterations ends with 1 % more error.
2. ρ is measured in units of the harmonic mean of the eigenvalues of H, not of their mean: it is
   the weak directions that decide where the search must begin.
3. ρ grows by one slow constant factor, and the search ends when the mask has settled, of outputs
   that are independent in each block of them by itself.
4. `(H + ρI)⁻¹` is formed for several iterations at a time instead of one eigendecomposition,
   which costs ten times an inverse and doubles the work of each iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from iobs_onnx.solvers.allocate import allocate
from iobs_onnx.solvers.problem import Problem, Sparse, inverse
from iobs_onnx.solvers.quadratic import quadratic, quadratic_of_columns
from iobs_onnx.solvers.refit import refit
from iobs_onnx.sparsity import NM

# Outputs that are worked on at once, so that temporaries stay small; where they are independent,
# they are searched on their own.
_OUTPUTS = 512
# Up to so many inputs the result is held against plain magnitude pruning.
_FEW_INPUTS = 64
# Random vectors that the diagonal of an inverse is estimated by.
_PROBES = 512
# Standard deviation of the factor that shakes an iterate before the search is taken up again.
_SHAKE = 0.8
# Over-relaxation of the steps on a fixed mask.
_RELAXATION = 1.6


@dataclass(frozen=True)
class IOBS:
    """Proximal Newton support search with a conjugate-gradient refit.

    Attributes:
        rho: first weight of the proximal term, in the scaled space where `mean(diag H⁻¹) = 1`.
        growth: factor on ρ an iteration; slower growth finds better supports.
        saliency: share of `([H⁻¹]_jj)^(-1/2)` in the scaling; the rest is `√H_jj`.
        settled: the search ends when at most this fraction of a mask changed.
        inverses: the search ends in any case after so many; each is kept for as many iterations
            as take about its time.
        restarts: how often the search is taken up again at `rho` from the best point, shaken;
            every output keeps its best support, of unstructured patterns within the budget.
        tolerance: relative gradient on the support at which the refit ends; None for no refit,
            which leaves the weights near their optimum, not at it.
    """

    rho: float = 1.0
    growth: float = 1.02
    saliency: float = 0.75
    settled: float = 5e-4
    inverses: int = 1000
    restarts: int = 0
    tolerance: float | None = 1e-4

    def solve(self, problem: Problem) -> Sparse:
        """Return a weight that is optimal on its support, to `tolerance`."""
        scale = self._scale(problem)
        hessian = (problem.damped / scale).div_(scale[:, None])
        states = [_State(problem, rows, scale[:, None]) for rows in blocks(problem)]
        # An inverse takes about as long as 1.5·in/out steps.
        hold = max(2, min(8, round(1.5 * len(scale) / (problem.of or len(problem.weight)))))
        self._search(states, hessian, hold)
        for _ in range(self.restarts):
            for state in states:
                state.reheat(self.rho)
            self._search(states, hessian, hold)
        found = [state.found() for state in states]
        return Sparse(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _scale(self, problem: Problem) -> torch.Tensor:
        inverse = inverse_diagonal(problem)
        scale = problem.damped.diagonal().pow((1.0 - self.saliency) / 2)
        scale = scale * inverse.pow(-self.saliency / 2)
        return scale / (inverse * scale.square()).mean().sqrt()

    def _search(self, states: Sequence[_State], hessian: torch.Tensor, hold: int) -> None:
        """Move every iterate until its mask has settled, then fit its weights.

        All share the inverses, each of which is kept for `hold` iterations.
        """
        rho, moving = self.rho, list(states)
        resolvent = _resolvent(hessian, rho)
        for count in range(self.inverses * hold):
            growth = 1.0
            if count and count % hold == 0:
                growth = self.growth**hold
                rho *= growth
                resolvent = _resolvent(hessian, rho)
            still = [state for state in moving if state.step(resolvent, growth) > self.settled]
            for state in moving:
                if state not in still:
                    state.settle(resolvent, rho, hold, self.tolerance)
            moving = still
            if not moving:
                return
        for state in moving:
            state.settle(resolvent, rho, hold, self.tolerance)


def blocks(problem: Problem) -> list[slice]:
    """Return the outputs that are searched together: each block stops for itself.

    Outputs of an N:M pattern share nothing but the inverses, so a search over some blocks ends with
    the same bits as one over all; a budget ties the outputs of other patterns together.
    """
    outputs = len(problem.weight)
    size = _OUTPUTS if isinstance(problem.pattern, NM) else outputs
    return [slice(start, min(start + size, outputs)) for start in range(0, outputs, size)]


class _State:
    """Where the search stands in one block of outputs. Tensors are `(in, out)`.

    Inputs come first in memory, so that the projection's groups are whole contiguous rows. The
    iterate `T = X + V/ρ` is all that an iteration leaves to the next: `D` is its kept part and
    `V/ρ` its removed part.
    """

    def __init__(self, problem: Problem, rows: slice, scale: torch.Tensor) -> None:
        self._problem, self._rows, self._scale = problem, rows, scale
        self._dense = problem.weight[rows].T.contiguous()
        self._noise = torch.Generator(scale.device).manual_seed(0)
        self._rho = 0.0  # the last one
        self.weight = self._dense * scale
        self._iterate = self.weight.clone()
        self._mask = self._project()
        self.best = self._dense
        self.best_mask = self._mask
        self._best_iterate = self._iterate

    def _project(self) -> torch.Tensor:
        return self._problem.project(self._iterate.abs().T).T

    def step(self, resolvent: torch.Tensor, growth: float) -> float:
        """Take one proximal Newton step and projection; return how much of the mask changed."""
        self.move(resolvent, growth)
        previous, self._mask = self._mask, self._project()
        return int((self._mask != previous).count_nonzero()) / self._mask.numel()

    def settle(
        self, resolvent: torch.Tensor, rho: float, hold: int, tolerance: float | None
    ) -> None:
        """End the search at this ρ: fit the weights, and keep what is better."""
        self._rho = rho
        for _ in range(max(2, hold // 2)):  # they cost no gradient to begin with, unlike the refit
            self.move(resolvent, relaxation=_RELAXATION)
        self._keep_better(tolerance)

    def found(self) -> Sparse:
        """Return the best point, `(out, in)`."""
        best = Sparse(self.best.T.contiguous(), self.best_mask.T.contiguous())
        return _no_worse_than_magnitude(self._problem, self._problem.weight[self._rows], best)

    def move(self, resolvent: torch.Tensor, growth: float = 1.0, relaxation: float = 1.0) -> None:
        """Take a proximal Newton step on the mask as it is; growing ρ shrinks `V/ρ`.

        With `A = ρ (H + ρI)⁻¹` the step is `X = W + A (D − V/ρ − W)`.
        """
        tensors = self.weight, self._iterate, self._mask
        for weight, iterate, mask in zip(*(x.split(_OUTPUTS, 1) for x in tensors), strict=True):
            kept = iterate * mask
            base = torch.add(weight, iterate - kept, alpha=1.0 / growth)
            iterate.lerp_(base.addmm_(resolvent, kept.sub_(base)), relaxation)

    def reheat(self, rho: float) -> None:
        """Go back to the best point, with `V/ρ` for this smaller ρ, shaken."""
        shape, device = self.weight.shape, self.weight.device
        shake = torch.randn(shape, generator=self._noise, device=device).mul_(_SHAKE).add_(1.0)
        cooled = self._best_iterate * (self._rho / rho)
        self._iterate = self._best_iterate.where(self.best_mask, cooled).mul_(shake)
        self._mask = self._project()

    def _keep_better(self, tolerance: float | None) -> None:
        """Fit the weights, if to a tolerance; take over what lowers the error in the budget."""
        problem, mask = self._problem, self._mask
        weight = (self._iterate / self._scale).mul_(mask)
        if tolerance is not None:
            parts = (tensor.split(_OUTPUTS, 1) for tensor in (self._dense, mask, weight))
            fitted = [
                refit(dense, kept, start, problem.damped, tolerance=tolerance)
                for dense, kept, start in zip(*parts, strict=True)
            ]
            weight = torch.cat(fitted, 1)
        if self.best is self._dense:
            self.best, self.best_mask, self._best_iterate = weight, mask, self._iterate
            return
        deltas = [found - self._dense for found in (self.best, weight)]
        errors = torch.stack([quadratic_of_columns(delta, problem.damped) for delta in deltas])
        counts = torch.stack([self.best_mask.sum(0), mask.sum(0)])
        tied = counts.shape[1:] if isinstance(problem.pattern, NM) else problem.blocks
        better = allocate(errors, counts, tied).bool()
        self.best = weight.where(better, self.best)
        self.best_mask = mask.where(better, self.best_mask)
        self._best_iterate = self._iterate.where(better, self._best_iterate)


def _no_worse_than_magnitude(problem: Problem, dense: torch.Tensor, found: Sparse) -> Sparse:
    """Where inputs are few, take over outputs whose largest weights alone leave a lower error.

    Among a handful of inputs the search can end beside the best support, about once in 1,500 layers
    of 4 or 8 inputs; with more of them it has not been seen above magnitude pruning.
    """
    if not isinstance(problem.pattern, NM) or dense.shape[1] > _FEW_INPUTS:
        return found
    mask = problem.project(dense.abs())
    plain = dense * mask
    error, other = (quadratic(w - dense, problem.damped) for w in (found.weight, plain))
    worse = (other < error)[:, None]
    return Sparse(plain.where(worse, found.weight), mask.where(worse, found.mask))


def inverse_diagonal(problem: Problem) -> torch.Tensor:
    """Return `diag (H + λI)⁻¹`, for more than `_PROBES` inputs an estimate.

    With the Cholesky factor `L` it holds the squared norms of the columns of `L⁻¹`, which random
    projections keep to within some `√(2/_PROBES)` (Johnson, Lindenstrauss, 1984).
    """
    inputs, device = len(problem.factor), problem.factor.device
    if inputs <= _PROBES:
        probes = torch.eye(inputs, device=device)
    else:
        noise = torch.Generator(device).manual_seed(0)
        probes = torch.randn(inputs, _PROBES, generator=noise, device=device) / _PROBES**0.5
    solved = torch.linalg.solve_triangular(problem.factor.mT, probes, upper=True)
    return solved.square().sum(1)


def _resolvent(hessian: torch.Tensor, rho: float) -> torch.Tensor:
    """Return `ρ (H + ρI)⁻¹`."""
    shifted = hessian / rho
    shifted.diagonal().add_(1.0)
    return inverse(shifted, f"H/ρ + I with ρ = {rho:.3g}")
