"""Exhaustive support search, for layers of so few inputs that every support can be tried."""

from __future__ import annotations

from itertools import combinations, product
from math import comb

import torch

from iobs_onnx.solvers.allocate import allocate
from iobs_onnx.solvers.problem import Problem
from iobs_onnx.sparsity import NM, Pattern


def all_supports(pattern: Pattern, inputs: int, most: int) -> list[list[int]] | None:
    """Return every support that an output may have, or None if there are more than `most`."""
    if not isinstance(pattern, NM):
        if 2**inputs > most:
            return None
        counts = range(inputs + 1)
        return [list(kept) for count in counts for kept in combinations(range(inputs), count)]
    groups = inputs // pattern.m
    if comb(pattern.m, pattern.n) ** groups > most:
        return None
    choices = list(combinations(range(pattern.m), pattern.n))
    return [
        [group * pattern.m + place for group, kept in enumerate(choice) for place in kept]
        for choice in product(choices, repeat=groups)
    ]


def exhaustive(problem: Problem, supports: list[list[int]]) -> torch.Tensor:
    """Return the mask `(out, in)` of least quadratic, every output on one of these supports.

    With `t = H w` the best weights on a support S explain `t_Sᵀ H_SS⁻¹ t_S` of `wᵀHw`. One
    factor of `H_SS` serves all outputs. In float64.

    Raises:
        SolverError: where `H + λI` is not positive definite in float32.
    """
    _ = problem.inverse  # raises
    hessian, weight = problem.damped.double(), problem.weight.T.double()
    target = hessian @ weight
    energy = (weight * target).sum(0)
    # The best support of every size: outputs of one site share an unstructured budget.
    inputs, rows = weight.shape
    errors = energy.new_full((inputs + 1, rows), torch.inf)
    masks = torch.zeros(inputs + 1, rows, inputs, dtype=torch.bool, device=weight.device)
    for support in supports:
        size = len(support)
        factor = torch.linalg.cholesky(hessian[support][:, support])
        explained = torch.linalg.solve_triangular(factor, target[support], upper=False)
        error = energy - explained.square().sum(0)
        better = error < errors[size]
        errors[size] = error.where(better, errors[size])
        mask = torch.zeros(inputs, dtype=torch.bool, device=weight.device)
        mask[support] = True
        masks[size, better] = mask
    every = torch.arange(rows, device=weight.device)
    # Any supports within the budget serve as the first ones.
    counts = problem.project(problem.weight.abs() * problem.curvature.sqrt()).sum(1)
    sizes = torch.arange(-1, inputs + 1, device=weight.device)[:, None].repeat(1, rows)
    sizes[0] = counts
    chosen = sizes[allocate(errors[sizes, every], sizes, problem.blocks), every]
    return masks[chosen, every]
