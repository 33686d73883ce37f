"""Layer-wise Optimal Brain Surgeon: saliencies from one inverse Hessian, and an error bound.

Dong, Chen, Pan: "Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain
Surgeon", NIPS 2017. Differences:

1. The saliencies fill a pattern; the paper prunes a layer until a tolerated error is reached.
2. The published code applies the updates of single weights one after another, all with the
   first inverse, and then sets the pruned weights to zero, which they no longer are: one
   Gauss-Seidel sweep for `[H⁻¹]_SS c = w_S`. Here the system is solved: all pruned weights
   end at zero and the others at their optimum. On transformer layers that halves the error.
3. `H` is damped, where the paper adds 1e-5 to the diagonal of its inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from iobs_onnx.solvers.problem import Problem, Sparse
from iobs_onnx.solvers.quadratic import squared_norms
from iobs_onnx.solvers.refit import refitted


@dataclass(frozen=True)
class LOBS:
    """Keep the largest `½ W_ij² / [H⁻¹]_jj`, measured once, and update the kept weights.

    The cheapest of the solvers that use the whole Hessian: one inverse and one refit.

    Attributes:
        tolerance: relative gradient on the support at which the refit ends.
    """

    tolerance: float = 1e-4

    def solve(self, problem: Problem) -> Sparse:
        """Return the weights of highest saliency, optimal on their support."""
        mask = problem.project(problem.weight.square() / problem.inverse.diagonal() / 2)
        return refitted(problem, mask, self.tolerance)


def output_bounds(problem: Problem, weight: torch.Tensor) -> torch.Tensor:
    """Return theorem 3.1's bound on the change of each output, `(out,)` float64.

    The root mean square of `y − y'` over the rows that `H` was made of is `√(δ H δᵀ)`, with `δ`
    the change of the output's weights, and after an activation that is 1-Lipschitz, such as
    ReLU, it is at most that.
    """
    return squared_norms(weight - problem.weight, problem.hessian).sqrt()


def network_bound(bounds: Sequence[float], weights: Sequence[torch.Tensor]) -> float:
    """Return theorem 3.2's bound on the change of a network's output.

    For a chain of layers, each pruned on the inputs it has in the dense network, with
    1-Lipschitz activations, the root mean square over samples of `‖y − y'‖₂` is at most
    `Σ_k bound_k Π_{l>k} ‖W_l‖_F`. The report's own bound is tighter and follows graphs that are no
    chains: :func:`iobs_onnx.passes.bound_changes`.

    Args:
        bounds: each layer's bound, first layer first: the norm of its :func:`output_bounds`,
            the root of `Solution.excess`.
        weights: each layer's pruned weight, `(out, in)`.
    """
    total = 0.0
    for bound, weight in zip(bounds, weights, strict=True):
        total = total * float(weight.norm()) + bound
    return total
