"""The quadratic form in its four shapes, each against NumPy's sum over all pairs of inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from iobs_onnx.solvers.quadratic import (
    quadratic,
    quadratic_of_columns,
    squared_norm,
    squared_norms,
)

# Products are made in float32.
ROUNDING = 1e-5


def test_every_form_is_the_sum_over_pairs_of_inputs() -> None:
    generator = np.random.default_rng(0)
    groups = generator.normal(size=(3, 5, 8))
    samples = generator.normal(size=(3, 20, 8))
    hessians = np.einsum("gni,gnj->gij", samples, samples)
    wanted = np.einsum("goi,gij,goj->go", groups, hessians, groups)
    weights, matrices = (torch.from_numpy(a).float() for a in (groups, hessians))
    for weight, hessian, row in zip(weights, matrices, wanted, strict=True):
        np.testing.assert_allclose(quadratic(weight, hessian), row, ROUNDING)
        np.testing.assert_allclose(quadratic_of_columns(weight.T, hessian), row, ROUNDING)
        np.testing.assert_allclose(squared_norms(weight, hessian), row, ROUNDING)
        assert squared_norm(weight, hessian) == pytest.approx(row.sum(), rel=ROUNDING)
    assert squared_norm(weights, matrices) == pytest.approx(wanted.sum(), rel=ROUNDING)


def test_what_is_reported_is_float64_and_never_below_zero() -> None:
    # Not positive semidefinite, as a Hessian is to rounding.
    weight, hessian = torch.ones(1, 2), torch.tensor([[-1.0, 0.0], [0.0, -1.0]])
    norms = squared_norms(weight, hessian)
    assert norms.dtype == torch.float64
    assert norms.tolist() == [0.0]
    assert squared_norm(weight, hessian) == 0.0
    assert quadratic(weight, hessian).tolist() == [-2.0]
