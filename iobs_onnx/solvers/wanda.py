"""Wanda: weights times the norm of their input.

Sun, Liu, Bair, Kolter: "A Simple and Effective Pruning Approach for Large Language Models",
ICLR 2024, equation 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from iobs_onnx.solvers.problem import Problem, Sparse
from iobs_onnx.sparsity import NM


@dataclass(frozen=True)
class Wanda:
    """Keep the largest `|W_ij| · ‖x_j‖₂`, compared within each output; no weight is updated."""

    def solve(self, problem: Problem) -> Sparse:
        """Return the weights of highest score; `‖x_j‖₂` is `√H_jj` up to a constant."""
        scores = problem.weight.abs() * problem.hessian.diagonal().clamp_min(0).sqrt()
        if isinstance(problem.pattern, NM):
            mask = problem.project(scores)
        else:
            # The paper compares within each output, not over the whole matrix.
            inputs = scores.shape[1]
            # Rounded first: 0.55 · 100 is a little over 55 in floating point.
            removed = math.ceil(round(problem.pattern.fraction * inputs, 6))
            order = scores.argsort(dim=1, descending=True, stable=True)
            mask = scores.new_zeros(scores.shape, dtype=torch.bool)
            mask.scatter_(1, order[:, : inputs - removed], True)
        return Sparse(problem.weight * mask, mask)
