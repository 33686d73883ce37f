"""Optimal Brain Damage: the second-order saliency with a diagonal Hessian.

LeCun, Denker, Solla: "Optimal Brain Damage", NIPS 1989, equation 5.
"""

from __future__ import annotations

from dataclasses import dataclass

from iobs_onnx.solvers.problem import Problem, Sparse


@dataclass(frozen=True)
class OBD:
    """Keep the largest `½ H_jj W_ij²`, compared over the whole matrix; no weight is updated.

    A diagonal Hessian says that no weight can make up for another, so kept weights stay as
    they are. Time `out · in`.
    """

    def solve(self, problem: Problem) -> Sparse:
        """Return the weights of highest saliency, unchanged."""
        saliency = problem.weight.square() * problem.damped.diagonal() / 2
        mask = problem.project(saliency)
        return Sparse(problem.weight * mask, mask)
