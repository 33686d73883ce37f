"""Layer problems, and answers to them that share no code with the solvers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from iobs_onnx.solvers import Problem
from iobs_onnx.sparsity import NM, Pattern

Matrix = NDArray[np.float64]
MakeProblem = Callable[..., Problem]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A product of this size is done before a second thread has woken up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _inputs(kind: str, inputs: int, generator: np.random.Generator) -> Matrix:
    """Rows of a layer's input; what they have in common is the point of each kind."""
    rows = inputs // 2 if kind == "singular" else 6 * inputs
    x = generator.normal(size=(rows, inputs))
    if kind == "white":
        return x
    x = x @ (np.eye(inputs) + 0.5 * generator.normal(size=(inputs, inputs)))
    if kind == "scaled":
        x *= np.exp(generator.normal(size=inputs) * 1.5)
    if kind == "dead":
        x[:, :: max(2, inputs // 5)] = 0.0
    return x


@pytest.fixture(scope="session")
def make_problem() -> MakeProblem:
    """`make_problem(kind, pattern, outputs, inputs, seed)`; damping is 1 % as in `solve_layer`."""

    def make(
        kind: str,
        pattern: Pattern,
        outputs: int = 10,
        inputs: int = 48,
        seed: int = 0,
        damping: float = 0.01,
    ) -> Problem:
        generator = np.random.default_rng(seed)
        x = _inputs(kind, inputs, generator)
        weight = generator.normal(size=(outputs, inputs))
        if kind == "zero rows":
            weight[::3] = 0.0
        if kind == "ties":
            weight = np.sign(weight)
        hessian = torch.from_numpy(x.T @ x / len(x)).float()
        return Problem(
            torch.from_numpy(weight).float(),
            hessian,
            damping * float(hessian.diagonal().mean()),
            pattern,
            (outputs,),
        )

    return make


def quadratic(problem: Problem, weight: torch.Tensor) -> Matrix:
    """`tr((X − W)(H + λI)(X − W)ᵀ)` of each row, in float64."""
    delta = (weight - problem.weight).double().numpy()
    return np.einsum("ij,jk,ik->i", delta, problem.damped.double().numpy(), delta)


@pytest.fixture(scope="session")
def errors() -> Callable[[Problem, torch.Tensor], Matrix]:
    return quadratic


def _best_on(support: tuple[int, ...], weight: Matrix, hessian: Matrix) -> float:
    """Least quadratic of one row with this support, by solving its normal equations."""
    kept = list(support)
    x = np.zeros_like(weight)
    if kept:
        x[kept] = np.linalg.solve(hessian[np.ix_(kept, kept)], hessian[kept] @ weight)
    return float((x - weight) @ hessian @ (x - weight))


def exhaustive(problem: Problem) -> float:
    """Least quadratic over every weight that fits the pattern."""
    hessian = problem.damped.double().numpy()
    rows = problem.weight.double().numpy()
    inputs = len(hessian)
    by_count = np.full((len(rows), inputs + 1), np.inf)
    for row, weight in enumerate(rows):
        for count in range(inputs + 1):
            for support in combinations(range(inputs), count):
                if isinstance(problem.pattern, NM):
                    groups = np.bincount(
                        np.array(support, int) // problem.pattern.m,
                        minlength=inputs // problem.pattern.m,
                    )
                    if (groups > problem.pattern.n).any():
                        continue
                found = _best_on(support, weight, hessian)
                by_count[row, count] = min(by_count[row, count], found)
    if isinstance(problem.pattern, NM):
        return float(by_count.min(1).sum())
    # The rows share one budget.
    budget = problem.pattern.keep(rows.size)
    least = np.full(budget + 1, np.inf)
    least[0] = 0.0
    for costs in by_count:
        least = np.array(
            [
                min(least[b - c] + costs[c] for c in range(min(b, inputs) + 1))
                for b in range(budget + 1)
            ]
        )
    return float(least.min())


@pytest.fixture(scope="session")
def optimum() -> Callable[[Problem], float]:
    return exhaustive
