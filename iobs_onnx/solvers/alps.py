"""ALPS as published: the reference that the default solver is measured against.

Meng, Behdin, Wang, Mazumder: "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning
for Large Language Models", NeurIPS 2024, algorithm 1 and appendix B.1 for the schedule of ρ.
Differences from the published code:

1. Damping is the caller's (`Problem.damped`), by default the same 1 % of the mean diagonal.
2. Stacked weights each spend their own unstructured budget; the support change is counted
   over all of them.
3. The eigendecomposition is made in float64, as published, but `(H + ρI)⁻¹` is multiplied
   out from it in float32, which is several times faster and changes no digit that matters.
4. The final conjugate gradients end early when the gradient of all outputs together is small,
   not when each input's is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from iobs_onnx.solvers.problem import Problem, Sparse
from iobs_onnx.solvers.refit import refine


@dataclass(frozen=True)
class ALPS:
    """Alternating direction method of multipliers with ρ driven by the change of the support.

    `H` is scaled to a unit diagonal. Every `interval` iterations ρ grows by 1.3, 1.2 or 1.1,
    by how much of the support changed. Time: one eigendecomposition, about `10 in³`, and each
    iteration `in² out`, every third one `in³` more.

    Attributes:
        rho: first ρ; divided by 5 where it leaves the first support unchanged.
        iterations: the search ends then in any case.
        interval: iterations between changes of ρ.
        patience: iterations before which a settling support does not end the search.
        settled: the search ends when at most this fraction of the support changed.
        refinements: conjugate gradient iterations on the final support, so the weights are
            near their optimum, not at it.
    """

    rho: float = 0.1
    iterations: int = 300
    interval: int = 3
    patience: int = 30
    settled: float = 3e-4
    refinements: int = 10

    def solve(self, problem: Problem) -> Sparse:
        """Return the weights that the published schedule ends with."""
        scale = problem.curvature.sqrt()
        hessian = problem.damped / (scale * scale[:, None])
        dense = (problem.weight * scale).T.contiguous()
        point = self._search(problem, dense, hessian)
        mask = _project(problem, point)
        refined = refine(dense, mask, point, hessian, self.refinements)
        return Sparse((refined / scale[:, None]).T.contiguous(), mask.T.contiguous())

    def _search(self, problem: Problem, dense: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        """Return the last `B`, `(in, out)` in the scaled space. Letters as in the paper."""
        values, vectors = torch.linalg.eigh(hessian.double())
        values, vectors = values.float(), vectors.float()
        target = hessian @ dense
        mask = previous = _project(problem, dense)
        kept = int(mask.sum())
        rho, started = self.rho, False
        b, d, v = dense, dense * mask, torch.zeros_like(dense)
        inverse = _inverse(values, vectors, rho)
        for count in range(1, self.iterations + 1):
            b = inverse @ (target - v + rho * d)
            moved = b + v / rho
            mask = _project(problem, moved)
            d = moved * mask
            v = v + rho * (b - d)
            if count % self.interval:
                continue
            changed = int((mask != previous).sum())
            previous = mask
            if not changed and started:
                break
            if growth := _growth(changed / kept, started):
                rho, started = min(rho * growth, _LARGEST_RHO), True
            else:
                # The support hardly moves: ρ was too large to search with. Begin again.
                rho /= 5
                if changed:
                    b, v = dense, torch.zeros_like(dense)
                    d = dense * _project(problem, dense)
            inverse = _inverse(values, vectors, rho)
            if count > self.patience and changed < self.settled * kept:
                break
        return b


def _growth(change: float, started: bool) -> float | None:
    """Return the factor on ρ for this share of changed support; None: ρ is too large."""
    if change > 0.1:
        return 1.3
    if change > 0.005:
        return 1.2
    return 1.1 if started else None


def _inverse(values: torch.Tensor, vectors: torch.Tensor, rho: float) -> torch.Tensor:
    """Return `(H + ρI)⁻¹`."""
    return (vectors / (values + rho)) @ vectors.T


def _project(problem: Problem, scores: torch.Tensor) -> torch.Tensor:
    return problem.project(scores.abs().T).T


_LARGEST_RHO = 1e6
