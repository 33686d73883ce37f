"""Each published algorithm against a naive float64 version of it, written from the paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from iobs_onnx.errors import OptionError, SolverError
from iobs_onnx.solvers import (
    ALPS,
    CBS,
    EBD,
    LOBS,
    OBD,
    OBS,
    Magnitude,
    Problem,
    Sparse,
    SparseGPT,
    Wanda,
    make_solver,
)
from iobs_onnx.solvers import ebd as ebd_module
from iobs_onnx.solvers.eigenspace import Eigenspace, LowRankRows
from iobs_onnx.solvers.lobs import network_bound, output_bounds
from iobs_onnx.solvers.tableau import WIDTH, Tableaux
from iobs_onnx.sparsity import NM, Pattern, Unstructured

Matrix = NDArray[np.float64]
MakeProblem = Callable[..., Problem]
Errors = Callable[[Problem, torch.Tensor], Matrix]
BOTH = pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6)], ids=str)


def arrays(problem: Problem) -> tuple[Matrix, Matrix]:
    return problem.weight.double().numpy(), problem.damped.double().numpy()


def largest(scores: Matrix, keep: int) -> NDArray[np.bool_]:
    """Mask of the largest scores of the whole array, by a stable sort."""
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(-scores, axis=None, kind="stable")[:keep]] = True
    return mask.reshape(scores.shape)


def fit(scores: Matrix, pattern: Pattern) -> NDArray[np.bool_]:
    if isinstance(pattern, Unstructured):
        return largest(scores, pattern.keep(scores.size))
    mask = np.zeros(scores.shape, bool)
    for row, start in product(range(len(scores)), range(0, scores.shape[1], pattern.m)):
        mask[row, start : start + pattern.m] = largest(
            scores[row, start : start + pattern.m], pattern.n
        )
    return mask


def optimal(weight: Matrix, mask: NDArray[np.bool_], hessian: Matrix) -> Matrix:
    """Each row's least-squares weights on its support."""
    result = np.zeros_like(weight)
    for row, kept in enumerate(mask):
        right = (hessian @ weight[row])[kept]
        result[row, kept] = np.linalg.solve(hessian[np.ix_(kept, kept)], right)
    return result


def close(found: torch.Tensor, expected: Matrix, tolerance: float = 1e-3) -> None:
    difference = np.linalg.norm(found.double().numpy() - expected)
    assert difference <= tolerance * np.linalg.norm(expected)


@BOTH
def test_scores_of_the_solvers_that_move_no_weight(
    make_problem: MakeProblem, pattern: Pattern
) -> None:
    problem = make_problem("scaled", pattern)
    weight, damped = arrays(problem)
    diagonal = problem.hessian.double().numpy().diagonal()
    norms = np.abs(weight) * np.sqrt(diagonal)
    wanda = fit(norms, pattern)
    if isinstance(pattern, Unstructured):  # the paper compares within an output
        keep = weight.shape[1] - int(np.ceil(pattern.fraction * weight.shape[1]))
        wanda = np.stack([largest(row, keep) for row in norms])
    for solver, mask in (
        (Magnitude(), fit(np.abs(weight), pattern)),
        (OBD(), fit(weight**2 * damped.diagonal() / 2, pattern)),
        (Wanda(), wanda),
    ):
        solution = solver.solve(problem)
        assert np.array_equal(solution.mask.numpy(), mask), solver
        assert torch.equal(solution.weight, problem.weight * torch.from_numpy(mask)), solver


def naive_sparsegpt(weight: Matrix, hessian: Matrix, pattern: Pattern, block: int) -> Matrix:
    """The inverse of the Hessian of the inputs not yet swept, made afresh at every input."""
    weight = weight.copy()
    inputs = weight.shape[1]
    remaining = [np.linalg.inv(hessian[j:, j:]) for j in range(inputs)]
    pivots = np.array([inverse[0, 0] for inverse in remaining])
    mask = np.ones(weight.shape, bool)
    step = pattern.m if isinstance(pattern, NM) else block
    for j in range(inputs):
        if j % step == 0:
            stop = min(j + step, inputs)
            scores = weight[:, j:stop] ** 2 / pivots[j:stop]
            if isinstance(pattern, NM):
                mask[:, j:stop] = fit(scores, pattern)
            else:
                keep = pattern.keep(weight.size)
                budget = keep * stop // inputs - keep * j // inputs
                mask[:, j:stop] = largest(scores, budget)
        error = np.where(mask[:, j], 0.0, weight[:, j]) / pivots[j]
        weight[:, j:] -= np.outer(error, remaining[j][0])
    return weight * mask


@pytest.mark.parametrize("block", [16, 128])
@BOTH
def test_sparsegpt(make_problem: MakeProblem, pattern: Pattern, block: int) -> None:
    for kind in ("correlated", "scaled", "dead"):
        problem = make_problem(kind, pattern)
        expected = naive_sparsegpt(*arrays(problem), pattern, block)
        close(SparseGPT(block=block).solve(problem).weight, expected)


def naive_obs_trace(
    weight: Matrix, hessian: Matrix, group: int, spare: int
) -> tuple[list[int], list[float]]:
    """Removals of one row and their costs, inverting the kept part of the Hessian every time."""
    kept = list(range(len(weight)))
    left = [spare] * (len(weight) // group)
    x = weight.copy()
    order, costs = [], []
    for _ in range(len(weight) // group * spare):
        inverse = np.linalg.inv(hessian[np.ix_(kept, kept)])
        allowed = np.array([left[j // group] > 0 for j in kept])
        cost = np.where(allowed, x[kept] ** 2 / inverse.diagonal(), np.inf)
        p = int(cost.argmin())
        x[kept] -= x[kept[p]] / inverse[p, p] * inverse[p]
        x[kept[p]] = 0.0
        order.append(kept[p])
        costs.append(float(cost[p]))
        left[kept[p] // group] -= 1
        kept.pop(p)
    return order, costs


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 8), NM(1, 16)], ids=str)
def test_obs_within_groups(make_problem: MakeProblem, pattern: NM) -> None:
    # 96 inputs: several flushes and a narrowing on the way.
    problem = make_problem("correlated", pattern, outputs=6, inputs=96)
    weight, hessian = arrays(problem)
    mask = np.ones(weight.shape, bool)
    for row, dense in enumerate(weight):
        mask[row, naive_obs_trace(dense, hessian, pattern.m, pattern.m - pattern.n)[0]] = False
    solution = OBS().solve(problem)
    assert np.array_equal(solution.mask.numpy(), mask)
    close(solution.weight, optimal(weight, mask, hessian))


@pytest.mark.parametrize("fraction", [0.3, 0.8])
def test_obs_with_one_budget(make_problem: MakeProblem, fraction: float) -> None:
    problem = make_problem("correlated", Unstructured(fraction), outputs=6, inputs=96)
    weight, hessian = arrays(problem)
    traces = [naive_obs_trace(row, hessian, 1, 1) for row in weight]
    # Cheapest beginnings of the traces: by the largest cost met so far.
    steps = sorted(
        (running, step, row)
        for row, (_, costs) in enumerate(traces)
        for step, running in enumerate(np.maximum.accumulate(costs))
    )
    mask = np.ones(weight.shape, bool)
    for _, step, row in steps[: round(fraction * weight.size)]:
        mask[row, traces[row][0][step]] = False
    solution = OBS().solve(problem)
    assert np.array_equal(solution.mask.numpy(), mask)
    close(solution.weight, optimal(weight, mask, hessian))


def test_obs_of_full_rank_is_obs(make_problem: MakeProblem) -> None:
    for pattern in (NM(2, 4), Unstructured(0.6)):
        problem = make_problem("correlated", pattern)
        whole = OBS(rank=48).solve(problem)
        assert torch.equal(whole.mask, OBS().solve(problem).mask)


@pytest.mark.parametrize("rank", [1, 5, 48])
def test_low_rank_state_is_that_of_its_matrix(make_problem: MakeProblem, rank: int) -> None:
    problem = make_problem("correlated", NM(2, 4))
    space = Eigenspace(problem, rank)
    weight, hessian = arrays(problem)
    values, vectors = np.linalg.eigh(problem.hessian.double().numpy())
    model = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
    model += np.diag(hessian.diagonal() - model.diagonal())
    state = LowRankRows(space, problem.weight)
    for step in range(20):
        state.remove(torch.arange(len(weight)) * 3 + step)
    costs = state.costs.double().numpy()
    for row, dense in enumerate(weight):
        kept = np.ones(48, bool)
        kept[row * 3 + np.arange(20)] = False
        inverse = np.linalg.inv(model[np.ix_(kept, kept)])
        x = inverse @ (model[kept] @ dense)
        expected = x**2 / inverse.diagonal()
        # Twenty removals, each rounding float32 times a condition of some 400.
        np.testing.assert_allclose(
            costs[row, kept], expected, rtol=1e-2, atol=1e-3 * expected.max()
        )


def test_obs_rank_must_exist(make_problem: MakeProblem) -> None:
    problem = make_problem("correlated", NM(2, 4))
    for rank in (0, 49):
        with pytest.raises(OptionError, match=f"rank {rank}: must be from 1 to .* 48"):
            OBS(rank=rank).solve(problem)
    flat = make_problem("dead", NM(2, 4), damping=0.0)
    with pytest.raises(SolverError, match="raise the damping or lower the rank"):
        OBS(rank=4).solve(flat)


@pytest.mark.parametrize("begin", ["kept", "removed"])
def test_tableau_is_its_definition(make_problem: MakeProblem, begin: str) -> None:
    problem = make_problem("correlated", NM(2, 4), outputs=5, inputs=24)
    weight, hessian = arrays(problem)
    if begin == "kept":
        state = Tableaux(-problem.inverse, problem.weight)
    else:
        state = Tableaux(problem.damped, problem.weight @ problem.damped)
    generator = np.random.default_rng(0)
    kept = np.full(weight.shape, begin == "kept")
    for _ in range(2 * WIDTH + 7):  # flushed twice, some changes pending
        which, active = generator.integers(24, size=5), generator.random(5) < 0.8
        state.move(torch.from_numpy(which), torch.from_numpy(active))
        kept[np.arange(5)[active], which[active]] ^= True
    assert np.array_equal(state.kept.numpy(), kept)
    every = torch.arange(24).expand(5, -1)
    found = state.columns(every).double().numpy()
    blocks = state.blocks(4).double().numpy()
    for row in range(5):
        a, b = np.flatnonzero(kept[row]), np.flatnonzero(~kept[row])
        inverse = np.linalg.inv(hessian[np.ix_(a, a)])
        tableau = np.empty((24, 24))
        tableau[np.ix_(a, a)] = -inverse
        tableau[np.ix_(a, b)] = inverse @ hessian[np.ix_(a, b)]
        tableau[np.ix_(b, a)] = tableau[np.ix_(a, b)].T
        tableau[np.ix_(b, b)] = (
            hessian[np.ix_(b, b)] - hessian[np.ix_(b, a)] @ tableau[np.ix_(a, b)]
        )
        x = np.zeros(24)
        x[a] = inverse @ hessian[a] @ weight[row]
        y = np.where(kept[row], x, hessian @ (weight[row] - x))
        scale = np.abs(tableau).max()
        np.testing.assert_allclose(state.y[row], y, atol=1e-3 * np.abs(y).max())
        np.testing.assert_allclose(state.diagonal[row], tableau.diagonal(), atol=1e-3 * scale)
        off = ~np.eye(24, dtype=bool)
        np.testing.assert_allclose(found[row][off], tableau[off], atol=1e-3 * scale)
        for group in range(6):
            part = tableau[4 * group : 4 * group + 4, 4 * group : 4 * group + 4]
            off = ~np.eye(4, dtype=bool)
            np.testing.assert_allclose(blocks[row, group][off], part[off], atol=1e-3 * scale)


def swaps(mask: NDArray[np.bool_], pattern: Pattern) -> list[tuple[int, int]]:
    """Pairs (kept, removed) of one row that may change places."""
    pairs = product(np.flatnonzero(mask), np.flatnonzero(~mask))
    if isinstance(pattern, Unstructured):
        return list(pairs)
    return [(i, j) for i, j in pairs if i // pattern.m == j // pattern.m]


@dataclass(frozen=True)
class Given:
    """Stands for the solver that CBS starts from."""

    mask: torch.Tensor

    def solve(self, problem: Problem) -> Sparse:
        return Sparse(problem.weight * self.mask, self.mask)


def row_error(problem: Problem, row: int, mask: NDArray[np.bool_]) -> float:
    weight, hessian = arrays(problem)
    x = optimal(weight[row : row + 1], mask[None], hessian)[0] - weight[row]
    return float(x @ hessian @ x)


def flipped(mask: NDArray[np.bool_], *which: int) -> NDArray[np.bool_]:
    other = mask.copy()
    other[list(which)] ^= True
    return other


def row_alone(problem: Problem, row: int, keep: int) -> Problem:
    pattern = problem.pattern
    if isinstance(pattern, Unstructured):
        pattern = Unstructured(1 - keep / problem.weight.shape[1])
    return replace(problem, weight=problem.weight[row : row + 1], pattern=pattern, blocks=(1,))


@pytest.mark.parametrize("start", ["magnitude", "sparsegpt", "iobs"])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 8), Unstructured(0.4)], ids=str)
def test_cbs_without_tenure_ends_where_no_swap_helps(
    make_problem: MakeProblem, errors: Errors, pattern: Pattern, start: str
) -> None:
    problem = make_problem("correlated", pattern, outputs=4, inputs=16)
    descent = CBS(candidates=16, tenure=0, tiny=0, start=make_solver(start))
    first = descent.start.solve(problem).mask
    least = np.empty(4)
    masks = np.empty((4, 16), bool)
    for row, mask in enumerate(first):
        alone = row_alone(problem, row, int(mask.sum()))
        solution = replace(descent, start=Given(mask[None])).solve(alone)
        least[row], masks[row] = errors(alone, solution.weight)[0], solution.mask.numpy()[0]
        for i, j in swaps(masks[row], pattern):
            assert row_error(problem, row, flipped(masks[row], i, j)) >= least[row] * (1 - 5e-4)
    total = errors(problem, descent.solve(problem).weight).sum()
    assert total <= least.sum() * (1 + 1e-4)
    if isinstance(pattern, Unstructured):
        # Together the rows may also pass a weight of the budget from one to another.
        change = [
            [row_error(problem, row, flipped(mask, j)) - least[row] for j in range(16)]
            for row, mask in enumerate(masks)
        ]
        gains = np.where(masks, np.inf, change).min(1)
        costs = np.where(masks, change, np.inf).min(1)
        for getter, giver in permutations(range(4), 2):
            assert total <= (least.sum() + gains[getter] + costs[giver]) * (1 + 1e-4)


def naive_tabu(problem: Problem, mask: NDArray[np.bool_], count: int, tenure: int) -> float:
    """Least error of one row on the way, every swap solved afresh."""
    least = row_error(problem, 0, mask)
    free = np.zeros(len(mask), int)
    for step in range(count):
        allowed = [pair for pair in swaps(mask, problem.pattern) if max(free[list(pair)]) <= step]
        if not allowed:
            break
        pair = min(allowed, key=lambda pair: row_error(problem, 0, flipped(mask, *pair)))
        mask = flipped(mask, *pair)
        free[list(pair)] = step + 1 + tenure
        least = min(least, row_error(problem, 0, mask))
    return least


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 8), Unstructured(0.625)], ids=str)
def test_cbs_goes_uphill_as_tabu_search_does(
    make_problem: MakeProblem, errors: Errors, pattern: Pattern
) -> None:
    better = []
    for seed in range(4):
        problem = make_problem("correlated", pattern, outputs=1, inputs=16, seed=seed)
        mask = Magnitude().solve(problem).mask
        solver = CBS(start=Given(mask), swaps=12, tenure=3, candidates=16, tiny=0)
        found = errors(problem, solver.solve(problem).weight)[0]
        assert found == pytest.approx(naive_tabu(problem, mask.numpy()[0], 12, 3), rel=1e-4)
        descent = replace(solver, tenure=0, swaps=99).solve(problem)
        better.append(found < errors(problem, descent.weight)[0] * (1 - 1e-3))
    assert any(better) or isinstance(pattern, Unstructured)


@BOTH
def test_cbs_never_loses_to_its_start(
    make_problem: MakeProblem, errors: Errors, pattern: Pattern
) -> None:
    for kind, start in product(("scaled", "singular", "ties"), (Magnitude(), OBS(), ALPS())):
        problem = make_problem(kind, pattern)
        weight, hessian = arrays(problem)
        first = CBS(start=start, swaps=0).solve(problem)
        close(first.weight, optimal(weight, first.mask.numpy(), hessian), 2e-2)
        begun = optimal(weight, make_solver(start).solve(problem).mask.numpy(), hessian)
        before = errors(problem, torch.from_numpy(begun)).sum()
        after = errors(problem, CBS(start=start).solve(problem).weight).sum()
        assert after <= before * (1 + 1e-4)  # what a refit's tolerance leaves


@BOTH
def test_cbs_leaves_wide_layers_to_its_start(make_problem: MakeProblem, pattern: Pattern) -> None:
    problem = make_problem("correlated", pattern)
    first = Magnitude().solve(problem)
    assert torch.equal(CBS(start=Magnitude(), widest=47).solve(problem).mask, first.mask)
    assert not torch.equal(CBS(start=Magnitude(), widest=48).solve(problem).mask, first.mask)


@BOTH
def test_lobs(make_problem: MakeProblem, pattern: Pattern) -> None:
    problem = make_problem("correlated", pattern)
    weight, hessian = arrays(problem)
    mask = fit(weight**2 / np.linalg.inv(hessian).diagonal(), pattern)
    solution = LOBS().solve(problem)
    assert np.array_equal(solution.mask.numpy(), mask)
    close(solution.weight, optimal(weight, mask, hessian))


def test_lobs_bounds_hold_in_a_network() -> None:
    """Theorems 3.1 and 3.2 on a ReLU network, each layer pruned on its dense inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=generator)
    weights = [torch.randn(32, 32, generator=generator) / 32**0.5 for _ in range(3)]
    dense, sparse = x, x
    bounds, pruned = [], []
    for weight in weights:
        hessian = dense.T @ dense / len(dense)
        damping = 0.01 * float(hessian.diagonal().mean())
        problem = Problem(weight, hessian, damping, NM(2, 4), (32,))
        solved = LOBS().solve(problem).weight
        bound = output_bounds(problem, solved)
        change = (dense @ weight.T).relu() - (dense @ solved.T).relu()
        assert bool((change.square().mean(0).sqrt() <= bound * (1 + 1e-5)).all())
        # Before the ReLU it is the change itself.
        change = dense @ (weight - solved).T
        assert torch.allclose(change.square().mean(0).sqrt(), bound.float(), rtol=1e-3)
        bounds.append(float(bound.norm()))
        pruned.append(solved)
        dense, sparse = (dense @ weight.T).relu(), (sparse @ solved.T).relu()
    change = (dense - sparse).square().sum(1).mean().sqrt()
    bound = network_bound(bounds, pruned)
    assert 0.01 * bound < float(change) <= bound


@BOTH
def test_ebd_lets_weights_come_back(
    make_problem: MakeProblem,
    errors: Errors,
    pattern: Pattern,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks = []
    plain = ebd_module.refine

    def spy(
        weight: torch.Tensor,
        mask: torch.Tensor,
        start: torch.Tensor,
        hessian: torch.Tensor,
        steps: int,
    ) -> torch.Tensor:
        masks.append(mask)
        return plain(weight, mask, start, hessian, steps)

    monkeypatch.setattr(ebd_module, "refine", spy)
    problem = make_problem("correlated", pattern)
    solution = EBD().solve(problem)
    removed_once = torch.stack([~mask for mask in masks[:-1]]).any(0)
    assert int((removed_once & solution.mask.T).sum()) > 0
    # Against Optimal Brain Damage with the same exact update of the kept weights.
    weight, hessian = arrays(problem)
    saliency = fit(weight**2 * hessian.diagonal(), pattern)
    plainly = torch.from_numpy(optimal(weight, saliency, hessian)).float()
    assert errors(problem, solution.weight).sum() < 0.8 * errors(problem, plainly).sum()


def naive_alps(weight: Matrix, hessian: Matrix, pattern: Pattern, rho: float) -> NDArray[np.bool_]:
    """The published loop, with the inverse made afresh; returns the support it ends with."""
    scale = np.sqrt(hessian.diagonal())
    h, w = hessian / np.outer(scale, scale), weight * scale
    target = w @ h
    grown = False
    support = previous = fit(np.abs(w), pattern)
    b, d, v = w, w * support, np.zeros_like(w)
    for i in range(300):
        b = (target - v + rho * d) @ np.linalg.inv(h + rho * np.eye(len(h)))
        d = b + v / rho
        support = fit(np.abs(d), pattern)
        d = d * support
        v = v + rho * (b - d)
        if (i + 1) % 3:
            continue
        change, kept = int((support != previous).sum()), int(support.sum())
        previous = support
        if change > 0.1 * kept:
            rho, grown = rho * 1.3, True
        elif change > 0.005 * kept:
            rho, grown = rho * 1.2, True
        elif change > 0 and grown:
            rho *= 1.1
        elif change > 0:
            rho /= 5
            b, d, v = w, w * fit(np.abs(w), pattern), np.zeros_like(w)
        elif grown:
            break
        else:
            rho /= 5
        if i >= 30 and change < 3e-4 * kept:
            break
    return fit(np.abs(b), pattern)


@pytest.mark.parametrize("rho", [0.1, 300.0])  # the second is too large to begin with
@BOTH
def test_alps(make_problem: MakeProblem, errors: Errors, pattern: Pattern, rho: float) -> None:
    for kind in ("correlated", "scaled", "white"):
        problem = make_problem(kind, pattern, outputs=16, inputs=64)
        weight, hessian = arrays(problem)
        mask = naive_alps(weight, hessian, pattern, rho)
        solution = ALPS(rho=rho).solve(problem)
        # A near tie may fall the other way in float32, and its neighbours with it.
        assert (solution.mask.numpy() != mask).mean() <= 0.01
        expected = torch.from_numpy(optimal(weight, mask, hessian)).float()
        ratio = errors(problem, solution.weight).sum() / errors(problem, expected).sum()
        assert ratio == pytest.approx(1.0, abs=0.02)


def test_obs_says_when_float32_is_not_enough(make_problem: MakeProblem) -> None:
    problem = make_problem("correlated", NM(2, 4))
    # What rounding does to an inverse that is nearly singular: a negative variance.
    spoiled = problem.inverse.clone()
    spoiled[5, 5] = -1e-3
    problem.__dict__["inverse"] = spoiled
    with pytest.raises(SolverError, match="too ill-conditioned for OBS in float32"):
        OBS().solve(problem)


def test_iobs_is_no_worse_than_magnitude_where_inputs_are_few() -> None:
    """In the damped error, which the solver minimises."""
    for seed in range(60):
        noise = torch.Generator().manual_seed(seed)
        inputs = (4, 8)[seed % 2]
        weight = torch.randn(8, inputs, generator=noise)
        mix = torch.eye(inputs) + 0.3 * torch.randn(inputs, inputs, generator=noise)
        rows = torch.tanh(torch.randn(60, inputs, generator=noise) @ mix)
        hessian = rows.T @ rows / len(rows)
        problem = Problem(weight, hessian, 0.01 * float(hessian.diagonal().mean()), NM(2, 4), (8,))
        errors = []
        for name in ("iobs", "magnitude"):
            solver = make_solver(name, "fast" if name == "iobs" else None)
            delta = solver.solve(problem).weight - weight
            errors.append(((delta @ problem.damped) * delta).sum(1))
        assert (errors[0] <= errors[1] * (1 + 1e-5)).all(), seed
