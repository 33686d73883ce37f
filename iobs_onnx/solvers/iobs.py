"""I-OBS: proximal Newton search for the support, then an exact refit on it.

The Newton step and projection are those of Wu, Modoranu, Safaryan, Kuznedelev, Alistarh: "The
Iterative Optimal Brain Surgeon", NeurIPS 2024. On a fixed quadratic a plain Newton step lands
on the same dense minimiser every time, so the step is made proximal (alternating direction
method of multipliers, as in Meng, Behdin, Wang, Mazumder: "ALPS", NeurIPS 2024, section 3).
Differences from ALPS:

1. The space is scaled by the OBS saliency, `s_j = ([H⁻¹]_jj)^(-1/2)`, blended with `√H_jj`:
   there the magnitude of a weight is what removing it costs when the others make up for it.
   With `√H_jj` alone the same number of iterations ends with 1 % more error.
2. ρ grows by one slow constant factor, and the search ends when the mask has settled.
3. `(H + ρI)⁻¹` is formed for several iterations at a time instead of one eigendecomposition,
   which costs ten times an inverse and doubles the work of each iteration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from iobs_onnx.solvers.problem import Problem, Sparse, inverse
from iobs_onnx.solvers.refit import refit


@dataclass(frozen=True)
class IOBS:
    """Proximal Newton support search with a conjugate-gradient refit.

    Attributes:
        rho: first weight of the proximal term, in the scaled space where `mean(diag H) = 1`.
        growth: factor on ρ an iteration; slower growth finds better supports.
        saliency: share of `([H⁻¹]_jj)^(-1/2)` in the scaling; the rest is `√H_jj`.
        settled: the search ends when at most this fraction of the mask changed.
        iterations: the search ends then in any case.
        tolerance: relative gradient on the support at which the refit ends.
    """

    rho: float = 0.1
    growth: float = 1.04
    saliency: float = 0.75
    settled: float = 1e-3
    iterations: int = 1000
    tolerance: float = 1e-4

    def solve(self, problem: Problem) -> Sparse:
        """Return a weight that is optimal on its support, to `tolerance`."""
        scale = self._scale(problem)
        # Inputs first in memory: the projection's groups are then whole contiguous rows.
        weight = (problem.weight * scale).T.contiguous()
        hessian = problem.damped / (scale * scale[:, None])
        point, mask = self._search(problem, weight, hessian)
        dense = problem.weight.T.contiguous()
        refitted = refit(
            dense, mask, point / scale[:, None], problem.damped, tolerance=self.tolerance
        )
        return Sparse(refitted.T.contiguous(), mask.T.contiguous())

    def _scale(self, problem: Problem) -> torch.Tensor:
        diagonal = problem.damped.diagonal()
        scale = diagonal.pow((1.0 - self.saliency) / 2)
        scale = scale * problem.inverse.diagonal().pow(-self.saliency / 2)
        return scale * (diagonal / scale.square()).mean().sqrt()

    def _search(
        self, problem: Problem, weight: torch.Tensor, hessian: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the last iterate and its mask, `(in, out)`, in the scaled space.

        The iterate `T = X + V/ρ` is all the state there is: `D` is its kept part and `V/ρ` its
        removed part. With `A = ρ (H + ρI)⁻¹` the proximal Newton step is
        `X = W + A (D − V/ρ − W)`.
        """
        inputs, outputs = weight.shape
        # An inverse costs about as much as 1.5·in/out steps.
        hold = max(2, min(8, round(1.5 * inputs / outputs)))
        rho, growth = self.rho, 1.0
        iterate = weight.clone()
        mask = problem.project(iterate.abs().T).T
        allowed = self.settled * mask.numel()
        for count in range(self.iterations):
            if count % hold == 0:
                rho *= growth
                resolvent = _resolvent(hessian, rho)
            else:
                growth = 1.0
            kept = iterate * mask
            # Growing ρ shrinks V/ρ, the removed part, by the same factor.
            base = torch.add(weight, iterate.sub_(kept), alpha=1.0 / growth)
            iterate = base.addmm(resolvent, kept.sub_(base))
            growth = self.growth**hold
            previous, mask = mask, problem.project(iterate.abs().T).T
            if int((mask != previous).sum()) <= allowed:
                break
        return iterate, mask


def _resolvent(hessian: torch.Tensor, rho: float) -> torch.Tensor:
    """Return `ρ (H + ρI)⁻¹`."""
    shifted = hessian / rho
    shifted.diagonal().add_(1.0)
    return inverse(shifted, f"H/ρ + I with ρ = {rho:.3g}")
