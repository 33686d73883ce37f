"""Magnitude pruning: keep the largest weights as they are; the Hessian is not used."""

from __future__ import annotations

from dataclasses import dataclass

from iobs_onnx.solvers.problem import Problem, Sparse


@dataclass(frozen=True)
class Magnitude:
    """Keep the largest `|W|`; kept weights are unchanged."""

    def solve(self, problem: Problem) -> Sparse:
        """Return the projection of `W` onto the pattern in the Euclidean norm."""
        mask = problem.project(problem.weight.abs())
        return Sparse(problem.weight * mask, mask)
