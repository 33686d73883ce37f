"""Every solver on every kind of problem and pattern, and against exhaustive support search."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from iobs_onnx.solvers import CBS, IOBS, OBS, PRESETS, SOLVERS, Magnitude, Problem, Solver, Sparse
from iobs_onnx.solvers.cut import cut
from iobs_onnx.sparsity import NM, Pattern, Unstructured

MakeProblem = Callable[..., Problem]
Errors = Callable[[Problem, torch.Tensor], NDArray[np.float64]]

TABLE: dict[str, Solver] = {
    **{name: solver() for name, solver in SOLVERS.items()},
    "obs rank 16": OBS(rank=16),
    "cbs from magnitude": CBS(start=Magnitude()),
    "cbs from iobs": CBS(start=IOBS(growth=1.2)),
}
KINDS = ("correlated", "white", "scaled", "singular", "dead", "zero rows", "ties")
PATTERNS: tuple[Pattern, ...] = (
    NM(2, 4),
    NM(1, 4),
    NM(4, 8),
    NM(5, 16),
    NM(12, 24),
    NM(4, 4),
    Unstructured(0.0),
    Unstructured(0.5),
    Unstructured(0.7),
    Unstructured(0.95),
)
# Solvers whose weights are optimal on their support.
REFITTED = (
    "ebd",
    "obs",
    "obs rank 16",
    "lobs",
    "cbs",
    "cbs from magnitude",
    "cbs from iobs",
    "iobs",
)


def check_pattern(problem: Problem, solution: Sparse, *, by_row: bool) -> None:
    weight, mask = solution
    assert weight.dtype == torch.float32
    assert mask.dtype == torch.bool
    assert weight.shape == mask.shape == problem.weight.shape
    assert bool(weight.isfinite().all())
    assert not bool(weight[~mask].any())
    pattern = problem.pattern
    if isinstance(pattern, NM):
        assert set(mask.unflatten(1, (-1, pattern.m)).sum(-1).flatten().tolist()) == {pattern.n}
    elif by_row:  # its budget is rounded in each output
        assert int(mask.sum()) <= pattern.keep(mask.numel())
    else:
        assert int(mask.sum()) == pattern.keep(mask.numel())
    assert pattern.violations(weight.numpy()) == 0


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_solver_on_every_kind(
    make_problem: MakeProblem, errors: Errors, name: str, pattern: Pattern
) -> None:
    for kind in KINDS:
        problem = make_problem(kind, pattern)
        weight, hessian = problem.weight.clone(), problem.hessian.clone()
        damped = problem.damped.clone()
        first = TABLE[name].solve(problem)
        second = TABLE[name].solve(make_problem(kind, pattern))
        check_pattern(problem, first, by_row=name == "wanda")
        assert torch.equal(problem.weight, weight), kind
        assert torch.equal(problem.hessian, hessian), kind
        assert torch.equal(problem.damped, damped), kind
        assert torch.equal(first.weight, second.weight), kind
        assert torch.equal(first.mask, second.mask), kind
        if name in REFITTED:
            exact = problem.damped.double()
            gradient = (first.weight.double() - weight.double()) @ exact
            scale = float((weight.double() @ exact).norm())
            assert float((gradient * first.mask).norm()) <= 1e-4 * scale, kind
        if problem.pattern.density == 1.0:
            # Inputs that are one: λ is 1 % of the mean of the diagonal, so the condition is at
            # most 100 · 48; times the rounding of float32 and the norm of a row, about 7.
            assert torch.allclose(first.weight, weight, atol=2e-3), kind
        if kind == "zero rows":
            assert float(first.weight[::3].abs().max()) == 0.0


@pytest.mark.parametrize("name", TABLE)
def test_a_single_output(make_problem: MakeProblem, name: str) -> None:
    """A matrix that many outputs would share is not the solver's own with one of them either."""
    problem = make_problem("correlated", NM(2, 4), outputs=1, inputs=96)
    damped, inverse = problem.damped.clone(), problem.inverse.clone()
    check_pattern(problem, TABLE[name].solve(problem), by_row=False)
    assert torch.equal(problem.damped, damped)
    assert torch.equal(problem.inverse, inverse)


@pytest.mark.parametrize("name", [name for name in TABLE if name != "wanda"])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)
def test_stacked_sites_hold_the_pattern_each(
    make_problem: MakeProblem, name: str, pattern: Pattern
) -> None:
    one = make_problem("correlated", pattern, outputs=24)
    stacked = Problem(one.weight, one.hessian, one.damping, pattern, (7, 16, 1))
    mask = TABLE[name].solve(stacked).mask
    for part in mask.split(stacked.blocks):
        assert int(part.sum()) == Unstructured(1 - pattern.density).keep(part.numel())


@pytest.mark.parametrize("solver", [IOBS(), PRESETS["fast"], IOBS(restarts=1)], ids=str)
def test_parts_are_solved_to_the_bits_of_the_whole(
    make_problem: MakeProblem, solver: Solver
) -> None:
    problem = make_problem("correlated", NM(2, 4), outputs=1400, inputs=96)
    whole = solver.solve(problem)
    for count in (2, 3, 5):
        parts = cut(problem, solver, count)
        assert [len(part.weight) for part in parts] == (
            [512, 888] if count == 2 else [512, 512, 376]
        )
        found = [solver.solve(part) for part in parts]
        for one, other in zip(whole, zip(*found, strict=True), strict=True):
            assert torch.equal(one, torch.cat(other))
    budget = make_problem("correlated", Unstructured(0.5), outputs=1400, inputs=96)
    for tied, other in ((problem, Magnitude()), (problem, PRESETS["best"]), (budget, solver)):
        (only,) = cut(tied, other, 3)
        assert only is tied


# Mean over the problems of error / optimum that each solver stays below; measured on these
# problems and then widened by about a quarter. The best preset and CBS try every support of so
# few inputs; CBS without that barely changes how many weights each output has. Magnitude, wanda,
# obd, sparsegpt and lobs carry no such bound.
EXACT = 1.0 + 1e-5
NEAR = {
    "ebd": (1.6, 2.2),
    "obs": (1.9, 1.6),
    "alps": (1.6, 1.5),
    "iobs": (1.6, 1.6),
    "cbs": (EXACT, EXACT),
    "cbs without trying all": (1.04, 1.7),
    "iobs best": (EXACT, EXACT),
}


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(2, 8), Unstructured(0.5)], ids=str)
def test_against_exhaustive_search(
    make_problem: MakeProblem,
    errors: Errors,
    optimum: Callable[[Problem], float],
    pattern: Pattern,
) -> None:
    table: dict[str, Solver] = {
        **{name: solver for name, solver in TABLE.items() if name != "obs rank 16"},
        "cbs without trying all": CBS(tiny=0),
        "iobs best": PRESETS["best"],
    }
    ratios: dict[str, list[float]] = {name: [] for name in table}
    for seed in range(12):
        problem = make_problem("correlated", pattern, outputs=3, inputs=8, seed=seed)
        least = optimum(problem)
        for name, found in ratios.items():
            error = errors(problem, table[name].solve(problem).weight).sum()
            assert error >= least * (1 - 1e-5), (name, seed)
            found.append(float(error / least))
    for name, (groups, budget) in NEAR.items():
        limit = groups if isinstance(pattern, NM) else budget
        assert np.mean(ratios[name]) <= limit, (name, np.mean(ratios[name]))


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.7)], ids=str)
def test_the_order_of_the_family(
    make_problem: MakeProblem, errors: Errors, pattern: Pattern
) -> None:
    """More of the Hessian gives less error: what the papers claim over their predecessors."""
    totals: dict[str, float] = {}
    for name, solver in TABLE.items():
        problems = [make_problem("correlated", pattern, 40, 96, seed) for seed in range(3)]
        totals[name] = sum(float(errors(p, solver.solve(p).weight).sum()) for p in problems)
    for better, worse, factor in (
        ("obd", "magnitude", 1.0),
        ("lobs", "obd", 0.75),
        ("obs rank 16", "lobs", 1.0),
        ("obs", "obs rank 16", 0.85),
        ("obs", "sparsegpt", 0.7),
        ("ebd", "sparsegpt", 0.6),
        ("alps", "obs", 0.95),
        ("iobs", "alps", 1.02),
        ("cbs", "sparsegpt", 0.5),
        ("cbs from magnitude", "magnitude", 0.4),
    ):
        assert totals[better] <= factor * totals[worse], (better, worse)
