"""Rounding with compensation, against exhaustive search and against GPTQ as it is written down."""

from __future__ import annotations

import itertools

import pytest
import torch

from iobs_onnx.errors import SolverError
from iobs_onnx.solvers.rounding import nearest, round_compensated, steps
from iobs_onnx.sparsity import parse_sparsity


def problem(out: int, inputs: int, pattern: str, seed: int = 0):
    """A weight pruned by magnitude, its dense aim, and a Hessian of correlated inputs."""
    random = torch.Generator().manual_seed(seed)
    aim = torch.randn(out, inputs, generator=random)
    mix = torch.randn(inputs, inputs, generator=random)
    x = torch.randn(4 * inputs, inputs, generator=random) @ (mix + 2 * torch.eye(inputs))
    hessian = x.T @ x / len(x)
    mask = parse_sparsity(pattern).project(aim.abs())
    return aim * mask, mask, aim, hessian


def error(weight: torch.Tensor, aim: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    change = (weight - aim).double()
    return ((change @ hessian.double()) * change).sum(1)


def gptq(best: torch.Tensor, hessian: torch.Tensor, step: float, limit: int) -> torch.Tensor:
    """One row, as published: column by column on the inverse, eliminated at every step."""
    order = hessian.diagonal().argsort(descending=True)
    w, inverse = best[order].double(), torch.linalg.inv(hessian[order][:, order].double())
    codes = torch.zeros(len(w), dtype=torch.float64)
    for j in range(len(w)):
        codes[j] = (w[j] / step).round().clamp(-limit, limit)
        w -= (w[j] - codes[j] * step) / inverse[j, j] * inverse[j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # eliminated
    back = torch.empty_like(codes)
    back[order] = codes
    return back


@pytest.mark.parametrize("pattern", ["2:4", "0.6"])
def test_it_is_gptq_on_the_support_of_each_output(pattern: str) -> None:
    weight, mask, aim, hessian = problem(6, 16, pattern)
    step = steps(weight, limit=7)
    found = round_compensated(weight, mask, aim, hessian, step, limit=7)
    for row in range(6):
        kept = mask[row].nonzero().squeeze(1)
        part = hessian[kept][:, kept]
        best = torch.linalg.solve(part.double(), (hessian[kept] @ aim[row]).double())
        expected = gptq(best, part, float(step[row]), 7)
        assert found.codes[row, kept].tolist() == expected.tolist()
        assert not found.codes[row, ~mask[row]].any()


def test_it_is_near_the_best_of_all_roundings_and_below_the_nearest() -> None:
    weight, mask, aim, hessian = problem(24, 8, "2:4", seed=3)
    step = steps(weight, limit=3)
    ours = error(round_compensated(weight, mask, aim, hessian, step, limit=3).weight, aim, hessian)
    plain = error(nearest(weight, step, limit=3).weight, aim, hessian)
    grid = torch.tensor(list(itertools.product(range(-3, 4), repeat=4)), dtype=torch.float32)
    best = torch.empty(24, dtype=torch.float64)
    for row in range(24):
        candidates = torch.zeros(len(grid), 8)
        candidates[:, mask[row]] = grid * step[row]
        best[row] = error(candidates, aim[row], hessian).min()
    assert (ours >= best - 1e-6).all()
    # Geometric means over the outputs, of the error that no rounding can avoid.
    assert (ours / best).log().mean().exp() < 1.2
    assert (plain / best).log().mean().exp() > 1.3


def test_limits_and_empty_rows_and_no_support() -> None:
    weight, mask, aim, hessian = problem(4, 8, "0.5")
    mask[1] = False
    weight = weight * mask
    step = steps(weight)
    assert step[1] == 1
    found = round_compensated(weight, mask, aim, hessian, step)
    assert found.codes.dtype == torch.int8
    assert not found.codes[1].any()
    assert int(found.codes.abs().max()) == 127
    none = torch.zeros_like(mask)
    assert not round_compensated(weight * 0, none, aim, hessian, step).codes.any()


def test_a_singular_hessian_is_an_error_with_a_remedy() -> None:
    weight, mask, aim, _ = problem(4, 8, "0.5")
    with pytest.raises(SolverError, match="raise the damping"):
        round_compensated(weight, mask, aim, -torch.eye(8), steps(weight))
