"""Early Brain Damage: prune little by little, and let pruned weights come back.

Tresp, Neuneier, Zimmermann: "Early Brain Damage", NIPS 1996. Optimal Brain Damage takes the
weights to be at a minimum. Where training was stopped early they are not: weight j, with
gradient `g_j`, would go to `w_j − g_j / H_jj` if it moved alone, and keeping it at zero
instead costs

    S_j = ½ H_jj (w_j − g_j / H_jj)²

of a quadratic with curvature `H_jj`. For a kept weight that is at its minimum it is the saliency of
Optimal Brain Damage; for a weight at zero it is `½ g_j² / H_jj`, what its return would gain.

On a layer the quadratic is known, so training between two prunings is a few steps of
conjugate gradients: stopped early, as in the paper. Differences:

1. The cost is the layer's, and its Hessian is exact on the diagonal.
2. Pruning follows the budget in equal stages, not a share of the weights a time, and goes on
   at the final budget until the support repeats or has stopped to improve.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from iobs_onnx.solvers.problem import Problem, Sparse
from iobs_onnx.solvers.refit import refine, refit
from iobs_onnx.sparsity import NM, Pattern, Unstructured


@dataclass(frozen=True)
class EBD:
    """Alternate between the saliency with the gradient term and a few steps of training.

    Time `in² out` a training step, `(stages + rounds) · (steps + 1)` of them at most.

    Attributes:
        stages: prunings on the way to an unstructured budget; N:M takes m − n, one weight of
            each group at a time.
        rounds: prunings at the final budget at most.
        steps: conjugate gradient iterations between two prunings.
        improvement: the search ends when a round lowers the error by less than this fraction.
        tolerance: relative gradient on the support at which the final refit ends.
    """

    stages: int = 16
    rounds: int = 20
    steps: int = 8
    improvement: float = 1e-3
    tolerance: float = 1e-4

    def solve(self, problem: Problem) -> Sparse:
        """Return the best support met at the final budget and the optimal weights on it."""
        hessian, dense = problem.damped, problem.weight.T.contiguous()
        curvature = problem.curvature[:, None]
        point, gradient = dense, torch.zeros_like(dense)
        least, best = float("inf"), torch.ones_like(dense, dtype=torch.bool)
        for pattern in self._budgets(problem.pattern):
            # All but a factor ½: the projection only compares.
            saliency = (point - gradient / curvature).square() * curvature
            mask = replace(problem, pattern=pattern).project(saliency.T).T
            point = refine(dense, mask, point, hessian, self.steps)
            gradient = hessian @ (point - dense)
            if pattern != problem.pattern:
                continue
            loss = float(((point - dense) * gradient).sum())
            if loss >= least * (1.0 - self.improvement):
                break
            least, best = loss, mask
        weight = refit(dense, best, point, hessian, tolerance=self.tolerance)
        return Sparse(weight.T.contiguous(), best.T.contiguous())

    def _budgets(self, final: Pattern) -> Iterator[Pattern]:
        if isinstance(final, NM):
            for kept in range(final.m - 1, final.n, -1):
                yield NM(kept, final.m)
        else:
            for stage in range(1, self.stages):
                yield Unstructured(final.fraction * stage / self.stages)
        for _ in range(self.rounds):
            yield final
