"""The budget shared by outputs, against every combination of their options."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from iobs_onnx.errors import SolverError
from iobs_onnx.solvers.allocate import allocate
from iobs_onnx.solvers.exhaustive import all_supports
from iobs_onnx.solvers.refit import refine, refit
from iobs_onnx.sparsity import NM, Unstructured


@pytest.mark.parametrize("seed", range(8))
def test_allocation_is_the_cheapest_combination(seed: int) -> None:
    generator = np.random.default_rng(seed)
    errors = generator.random((3, 7))
    counts = generator.integers(3, 7, (3, 7))
    errors[2, generator.integers(7)] = np.inf  # an option that does not exist
    blocks = (4, 1, 2)
    chosen = allocate(torch.from_numpy(errors), torch.from_numpy(counts), blocks).numpy()
    every = np.arange(7)
    for rows in np.split(every, np.cumsum(blocks)[:-1]):
        budget = counts[0, rows].sum()
        assert counts[chosen[rows], rows].sum() == budget
        least = min(
            errors[options, rows].sum()
            for options in product(range(3), repeat=len(rows))
            if counts[options, rows].sum() == budget
        )
        assert errors[chosen[rows], rows].sum() == pytest.approx(least, rel=1e-12)


def test_allocation_of_many_weights_at_once() -> None:
    """More than the 2048 weights that partial sums may stray by: still within the budget."""
    generator = np.random.default_rng(0)
    errors = generator.random((3, 400))
    counts = np.stack([np.full(400, 100), np.full(400, 117), np.full(400, 83)])
    chosen = allocate(torch.from_numpy(errors), torch.from_numpy(counts), (400,)).numpy()
    assert counts[chosen, np.arange(400)].sum() == 40000
    # 17 is passed on as a whole, so it is the problem with steps of one weight.
    ones = allocate(torch.from_numpy(errors), torch.from_numpy((counts - 100) // 17), (400,))
    assert errors[chosen, np.arange(400)].sum() == pytest.approx(
        errors[ones.numpy(), np.arange(400)].sum(), rel=1e-12
    )


def test_all_supports() -> None:
    assert all_supports(NM(1, 2), 4, most=4) == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert all_supports(NM(1, 2), 4, most=3) is None
    assert all_supports(Unstructured(0.5), 2, most=4) == [[], [0], [1], [0, 1]]
    assert all_supports(Unstructured(0.5), 3, most=7) is None


def test_refit_says_when_it_does_not_converge() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 4, generator=generator)
    mask = torch.rand(64, 4, generator=generator) < 0.5
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    hessian = (basis * torch.logspace(0, -12, 64)) @ basis.T
    with pytest.raises(SolverError, match=r"the refit ended after 1000 .* raise the damping"):
        refit(weight, mask, weight, hessian, tolerance=1e-9)


def test_refine_takes_so_many_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 3, generator=generator)
    mask = torch.rand(8, 3, generator=generator) < 0.5
    samples = torch.randn(40, 8, generator=generator)
    hessian = samples.T @ samples / 40
    losses = []
    for steps in (0, 1, 3, 30):
        delta = refine(weight, mask, weight, hessian, steps) - weight
        losses.append(float(((hessian @ delta) * delta).sum()))
    assert losses[0] > losses[1] > losses[2] >= losses[3] * (1 - 1e-6)
    exact = refit(weight, mask, weight, hessian, tolerance=1e-5) - weight
    assert losses[3] == pytest.approx(float(((hessian @ exact) * exact).sum()), rel=1e-5)
