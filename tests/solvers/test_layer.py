"""`solve_layer` and `solve_stacked`: types, errors, cross-Gram, stacking, the error reported."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from iobs_onnx.errors import DataError, OptionError, SolverError
from iobs_onnx.layer import solve_layer, solve_stacked
from iobs_onnx.solvers import ALPS, EBD, LOBS, OBS, SOLVERS, Solver, make_solver
from iobs_onnx.solvers.iobs import inverse_diagonal
from iobs_onnx.solvers.problem import Problem, Sparse
from iobs_onnx.sparsity import NM, Unstructured

Matrix = NDArray[np.float64]
EACH = pytest.mark.parametrize("name", SOLVERS)
# They use no inverse Hessian, so a singular one does not stop them.
DIAGONAL = ("magnitude", "wanda", "obd")


def layer(outputs: int = 12, inputs: int = 32, seed: int = 0) -> tuple[Matrix, Matrix]:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(5 * inputs, inputs))
    x = x @ (np.eye(inputs) + 0.4 * generator.normal(size=(inputs, inputs)))
    return generator.normal(size=(outputs, inputs)), x.T @ x / len(x)


@EACH
@pytest.mark.parametrize("sparsity", ["2:4", "60%"])
def test_kind_and_dtype_of_the_weight_come_back(name: str, sparsity: str) -> None:
    weight, hessian = layer()
    plain = solve_layer(weight, hessian, sparsity=sparsity, solver=name)
    assert plain.weight.dtype == np.float64
    assert plain.mask.dtype == bool
    single = torch.from_numpy(weight).float()
    second = torch.from_numpy(hessian).float()
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        before = single.to(dtype), second.to(dtype)
        given = before[0].clone(), before[1].clone()
        solved = solve_layer(*given, sparsity=sparsity, solver=name)
        assert solved.weight.dtype == dtype
        assert solved.mask.dtype == torch.bool
        assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))
        assert not bool(solved.weight[~solved.mask].any())
        if dtype in (torch.float64, torch.float32):
            assert np.array_equal(solved.mask.numpy(), plain.mask)
            np.testing.assert_allclose(solved.weight.numpy(), plain.weight, atol=1e-5)
        else:
            assert solved.layer_error == pytest.approx(plain.layer_error, rel=0.25, abs=0.01)
    half = solve_layer(
        weight.astype(np.float16), hessian.astype(np.float16), sparsity=sparsity, solver=name
    )
    assert half.weight.dtype == np.float16


def test_read_only_arrays_are_welcome() -> None:
    weight, hessian = layer()
    weight.setflags(write=False)
    hessian.setflags(write=False)
    solve_layer(weight, hessian, sparsity="2:4")


@EACH
def test_layer_error_is_its_formula(name: str) -> None:
    weight, hessian = layer()
    solved = solve_layer(weight, hessian, sparsity="2:4", solver=name)
    delta = solved.weight - weight
    excess, energy = np.trace(delta @ hessian @ delta.T), np.trace(weight @ hessian @ weight.T)
    assert solved.excess == pytest.approx(excess, rel=1e-4)
    assert solved.energy == pytest.approx(energy, rel=1e-4)
    assert solved.layer_error == pytest.approx(excess / energy, rel=1e-4)


@EACH
def test_one_line_errors(name: str) -> None:
    weight, hessian = layer(inputs=30)
    with pytest.raises(OptionError, match=r"2:4 does not fit .*30 inputs .* not a multiple of 4"):
        solve_layer(weight, hessian, sparsity="2:4", solver=name)
    weight, hessian = layer()
    with pytest.raises(OptionError, match="damping -1"):
        solve_layer(weight, hessian, sparsity="2:4", solver=name, damping=-1.0)
    with pytest.raises(OptionError, match="damping nan"):
        solve_layer(weight, hessian, sparsity="2:4", solver=name, damping=float("nan"))
    for value in (np.nan, np.inf):
        broken = weight.copy()
        broken[1, 2] = value
        with pytest.raises(DataError, match="weight: holds NaN or Inf"):
            solve_layer(broken, hessian, sparsity="2:4", solver=name)
        broken = hessian.copy()
        broken[3, 3] = value
        with pytest.raises(DataError, match="hessian: holds NaN or Inf"):
            solve_layer(weight, broken, sparsity="2:4", solver=name)
        with pytest.raises(DataError, match="cross_gram: holds NaN or Inf"):
            solve_layer(weight, hessian, sparsity="2:4", solver=name, cross_gram=broken)


def test_shapes_and_names() -> None:
    weight, hessian = layer()
    with pytest.raises(DataError, match=r"hessian: expected shape \(32, 32\), got \(31, 31\)"):
        solve_layer(weight, hessian[1:, 1:], sparsity="2:4")
    with pytest.raises(DataError, match="weight: expected a matrix"):
        solve_layer(weight[0], hessian, sparsity="2:4")
    with pytest.raises(DataError, match="floating dtype"):
        solve_layer(weight.astype(np.int32), hessian, sparsity="2:4")
    skew = hessian + np.triu(hessian, 1)
    with pytest.raises(DataError, match="not symmetric"):
        solve_layer(weight, skew, sparsity="2:4")
    with pytest.raises(OptionError, match="solver 'best' is unknown: choose from magnitude, "):
        solve_layer(weight, hessian, sparsity="2:4", solver="best")


@EACH
@pytest.mark.parametrize("sparsity", ["2:4", "0.5"])
def test_singular_hessian_needs_damping(name: str, sparsity: str) -> None:
    weight, hessian = layer()
    hessian[[3, 11]] = 0.0
    hessian[:, [3, 11]] = 0.0
    if name in DIAGONAL:
        solved = solve_layer(weight, hessian, sparsity=sparsity, solver=name, damping=0.0)
        assert 0 < solved.layer_error < 1
    else:
        with pytest.raises(SolverError, match="raise the damping"):
            solve_layer(weight, hessian, sparsity=sparsity, solver=name, damping=0.0)
    damped = solve_layer(weight, hessian, sparsity=sparsity, solver=name)
    assert 0 < damped.layer_error < 1


@EACH
def test_no_signal_at_all(name: str) -> None:
    weight, hessian = layer()
    solved = solve_layer(weight, np.zeros_like(hessian), sparsity="2:4", solver=name)
    assert solved.layer_error == 0.0
    assert int(solved.mask.sum()) == weight.size // 2


@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_cross_gram_moves_the_dense_minimiser(damping: float) -> None:
    weight, hessian = layer()
    other = layer(seed=1)[1] + 0.1 * np.random.default_rng(2).normal(size=(32, 32))
    ridge = damping * hessian.diagonal().mean() * np.eye(32)
    expected = weight @ (other + ridge) @ np.linalg.inv(hessian + ridge)
    for sparsity in ("4:4", "0.0"):
        solved = solve_layer(weight, hessian, sparsity=sparsity, cross_gram=other, damping=damping)
        difference = np.linalg.norm(solved.weight - expected)
        assert difference <= 1e-3 * np.linalg.norm(expected)
        assert solved.layer_error < 1e-6


@pytest.mark.parametrize("solver", [OBS(), LOBS(), EBD()])
def test_cross_gram_on_sampled_data(solver: Solver) -> None:
    """Least squares on the samples themselves: the pruned model's inputs are not the dense's."""
    generator = np.random.default_rng(0)
    dense = generator.normal(size=(400, 8)) @ generator.normal(size=(8, 8))
    pruned = 0.8 * dense + 0.3 * generator.normal(size=(400, 8)) + 0.2
    weight = generator.normal(size=(5, 8))
    solved = solve_layer(
        weight,
        pruned.T @ pruned / 400,
        sparsity="2:4",
        solver=solver,
        cross_gram=dense.T @ pruned / 400,
        damping=0.0,
    )
    target = dense @ weight.T
    lost = ((target - pruned @ solved.weight.T) ** 2).sum(0)
    supports = [
        [*left, *(4 + j for j in right)]
        for left in combinations(range(4), 2)
        for right in combinations(range(4), 2)
    ]
    for row, kept in enumerate(solved.mask):
        best, *_ = np.linalg.lstsq(pruned[:, kept], target[:, row])
        np.testing.assert_allclose(solved.weight[row, kept], best, rtol=2e-3, atol=2e-3)
        least = min(
            float(
                (
                    (
                        target[:, row]
                        - pruned[:, s] @ np.linalg.lstsq(pruned[:, s], target[:, row])[0]
                    )
                    ** 2
                ).sum()
            )
            for s in supports
        )
        assert lost[row] >= least * (1 - 1e-6)
    # Aiming at the dense weights instead loses more of the dense model's output.
    plain = solve_layer(weight, pruned.T @ pruned / 400, sparsity="2:4", solver=solver, damping=0.0)
    assert lost.sum() < ((target - pruned @ plain.weight.T) ** 2).sum()


@EACH
def test_stacking_is_solving_each(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 32, generator=generator) for rows in (9, 16, 4)]
    hessian = torch.from_numpy(layer()[1]).float()
    options = {"pattern": NM(2, 4), "solver": SOLVERS[name](), "damping": 0.01}
    together = solve_stacked(weights, hessian, **options)
    for weight, stacked in zip(weights, together, strict=True):
        alone = solve_stacked([weight], hessian, **options)[0]
        if name in ("alps", "ebd", "iobs"):
            # When to stop is decided for all rows together.
            assert stacked.layer_error == pytest.approx(alone.layer_error, rel=0.15)
        else:
            assert torch.equal(stacked.mask, alone.mask)
            assert torch.allclose(stacked.weight, alone.weight, atol=1e-2)
            assert stacked.layer_error == pytest.approx(alone.layer_error, rel=1e-4)


@EACH
def test_stacked_sites_have_their_own_budgets(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    # One site's weights are much larger: with a common budget it would take it all.
    weights = [torch.randn(8, 32, generator=generator) * size for size in (1.0, 100.0)]
    hessian = torch.from_numpy(layer()[1]).float()
    solved = solve_stacked(
        weights, hessian, pattern=Unstructured(0.75), solver=SOLVERS[name](), damping=0.01
    )
    assert [int(part.mask.sum()) for part in solved] == [64, 64]


def test_options_reach_the_solver() -> None:
    weight, hessian = layer(48, 64)
    quick = solve_layer(weight, hessian, sparsity="2:4", solver=ALPS(iterations=3, refinements=0))
    whole = solve_layer(weight, hessian, sparsity="2:4", solver=ALPS())
    assert whole.layer_error < quick.layer_error


@pytest.mark.parametrize("seed", range(3))
def test_iobs_begins_in_the_weak_directions_of_correlated_inputs(seed: int) -> None:
    # A first ρ in units of the mean eigenvalue ended above ALPS here.
    balanced, alps = _errors_on_neighbouring_pixels(seed, "iobs", "alps")
    assert balanced < 0.9 * alps


@pytest.mark.parametrize("seed", range(3))
def test_iobs_fast_takes_more_steps_where_outputs_are_few(seed: int) -> None:
    # With two steps of search and two of refinement whatever the shape it ended at 2.5 to 3 times
    # the error of ALPS here; six inputs an output pay for eight of them.
    fast, alps = _errors_on_neighbouring_pixels(seed, make_solver("iobs", "fast"), "alps")
    assert fast < alps


@pytest.mark.parametrize("inputs", [96, 1024])
def test_inverse_diagonal_is_exact_or_close(inputs: int) -> None:
    place = torch.arange(inputs, dtype=torch.float64)
    hessian = (
        0.9 ** (place[:, None] - place).abs() * (1 + place.sqrt()[:, None]) * (1 + place.sqrt())
    )
    problem = Problem(torch.ones(1, inputs), hessian.float(), 1e-3, NM(2, 4), (1,))
    damped = hessian + 1e-3 * torch.eye(inputs, dtype=torch.float64)
    ratio = inverse_diagonal(problem) / torch.linalg.inv(damped).diagonal()
    if inputs <= 512:
        assert ratio.sub(1).abs().max() < 1e-3
    else:  # standard deviation of an estimate by 512 vectors: √(2/512)
        assert ratio.sub(1).square().mean().sqrt() == pytest.approx((2 / 512) ** 0.5, rel=0.1)
        assert ratio.mean() == pytest.approx(1.0, abs=0.01)


def _errors_on_neighbouring_pixels(seed: int, *solvers: str | Solver) -> list[float]:
    """Most of the energy lies in a few directions, and the support is decided in the others."""
    place = np.arange(144)
    hessian = 0.99 ** np.abs(place[:, None] - place)
    weight = np.random.default_rng(seed).normal(size=(24, 144))
    return [
        solve_layer(weight, hessian, sparsity="70%", solver=solver).layer_error
        for solver in solvers
    ]


def test_solvers_multiply_in_float32_whatever_the_process_has_chosen() -> None:
    """TF32 and bfloat16 keep three digits: a Cholesky factor of a damped Hessian needs more."""
    seen = []

    class Looks:
        def solve(self, problem: Problem) -> Sparse:
            seen.append(torch.get_float32_matmul_precision())
            return Sparse(problem.weight, problem.weight != 0)

    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        solve_layer(np.eye(4, 8), np.eye(8), sparsity="2:4", solver=Looks())
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(chosen)
    assert seen == ["highest"]
