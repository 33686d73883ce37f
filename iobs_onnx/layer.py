"""One layer: from a dense weight and a Hessian to a sparse weight and what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from iobs_onnx.errors import DataError, OptionError, SolverError
from iobs_onnx.hessian import exact_float32
from iobs_onnx.solvers import Problem, Solver, Sparse, make_solver
from iobs_onnx.solvers.quadratic import squared_norms
from iobs_onnx.sparsity import Pattern, parse_sparsity

Array = TypeVar("Array", torch.Tensor, NDArray[np.generic])


@dataclass(frozen=True)
class Solution(Generic[Array]):
    """A solved layer.

    Attributes:
        weight: `(out, in)`, zero wherever the mask is False.
        mask: `(out, in)` bool, True = kept.
        excess: `tr(ΔW H ΔWᵀ)` with the undamped `H`.
        energy: `tr(W H Wᵀ)`; with a cross-Gram, `W` is the dense minimiser.
    """

    weight: Array
    mask: Array
    excess: float
    energy: float

    @property
    def layer_error(self) -> float:
        """`tr(ΔW H ΔWᵀ) / tr(W H Wᵀ)`; 0 where the denominator is 0."""
        return self.excess / self.energy if self.energy > 0 else 0.0

    @property
    def output_bound(self) -> float:
        """`√excess`: root mean square change of the layer's output vector.

        It bounds the change after any 1-Lipschitz activation (Dong, Chen, Pan: "Learning to Prune
        Deep Neural Networks via Layer-wise Optimal Brain Surgeon", NIPS 2017, theorem 3.1).
        """
        return math.sqrt(self.excess)


def solve_layer(
    weight: Array,
    hessian: Array,
    *,
    sparsity: str | float | Pattern,
    solver: str | Solver = "iobs",
    cross_gram: Array | None = None,
    damping: float = 0.01,
) -> Solution[Array]:
    """Prune one linear layer, minimising `½ E‖W x_d − X x_s‖²` over sparse `X`.

    Args:
        weight: the dense `W`, `(out, in)`, any floating dtype; NumPy or torch.
        hessian: `H = E[x_s x_sᵀ]`, `(in, in)`, symmetric positive semidefinite.
        sparsity: `"2:4"`, any `"N:M"` (N kept of M consecutive inputs), `"0.7"` or `"70%"`
            (fraction removed).
        solver: a name in :data:`iobs_onnx.solvers.SOLVERS`, or an instance with options.
        cross_gram: `C = E[x_d x_sᵀ]`, `(in, in)`, where the dense model's input `x_d` differs
            from the input `x_s` that the pruned model sees. The dense minimiser
            `W (C + λI)(H + λI)⁻¹` is then what is pruned.
        damping: λ as a fraction of `mean(diag H)`.

    Returns:
        The solution as the same kind of array, and dtype, as `weight`. The work is done in
        float32 on the device of `weight`. Inputs are not changed.

    Raises:
        DataError: shapes that do not fit, or values that are not finite.
        OptionError: an unknown solver, a damping below 0, or a pattern that does not fit `in`.
        SolverError: `H + λI` is not positive definite.
    """
    dense, matrix = _as_torch(weight), _as_torch(hessian)
    cross = None if cross_gram is None else _as_torch(cross_gram)
    pattern = parse_sparsity(sparsity)
    _check(dense, matrix, cross)
    if reason := pattern.misfit(dense.shape[1]):
        raise OptionError(f"sparsity {pattern} does not fit this weight: {reason}")
    weight32, hessian32 = dense.float(), matrix.float()
    if cross is not None:
        gradient = weight32 @ (hessian32 - cross.float())  # of f at W, `W H − W C`
        weight32 = newton_step(weight32, gradient, hessian32, damping=damping)
    solved = solve_stacked(
        [weight32], hessian32, pattern=pattern, solver=make_solver(solver), damping=damping
    )[0]
    return Solution(
        _like(solved.weight, weight),
        _like(solved.mask, weight, mask=True),
        solved.excess,
        solved.energy,
    )


@exact_float32()
def newton_step(
    start: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    *,
    damping: float,
    learning_rate: float = 1.0,
) -> torch.Tensor:
    """Return `W⁺ = W_t − η ∇f(W_t)(H + λI)⁻¹`.

    This is the dense step of I-OBS (Wu et al., NeurIPS 2024, algorithm 1). With `η = 1` and little
    damping it lands on the minimiser of the quadratic `f` from anywhere.

    Args:
        start: `W_t`, `(out, in)` float32.
        gradient: `∇f(W_t)`, `(out, in)`.
        hessian: `H`, `(in, in)`.
        damping: λ as a fraction of `mean(diag H)`.
        learning_rate: η.

    Raises:
        SolverError: `H + λI` is not positive definite.
    """
    damped = hessian.clone()
    damped.diagonal().add_(absolute_damping(damping, hessian))
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        raise SolverError(
            f"H + λI is not positive definite at damping {damping:g} (pivot {int(info)}): raise "
            "the damping or calibrate on more samples"
        )
    return start - learning_rate * torch.cholesky_solve(gradient.T, factor).T


def absolute_damping(damping: float, hessian: torch.Tensor) -> float:
    """Return λ for a fraction of `mean(diag H)`.

    Raises:
        OptionError: the fraction is negative.
    """
    if not damping >= 0:
        raise OptionError(f"damping {damping}: must be at least 0")
    level = float(hessian.diagonal().mean())
    # Without any signal damping has no scale: every weight then counts by its size alone.
    return damping * level if level > 0 else 1.0


@exact_float32()
def solve_stacked(
    weights: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    *,
    pattern: Pattern,
    solver: Solver,
    damping: float,
    solve: Callable[[Solver, Problem], Sparse] | None = None,
) -> list[Solution[torch.Tensor]]:
    """Prune several weights `(out_i, in)` that read the same input, sharing its factorisation.

    Each weight holds the pattern on its own. Arguments are as in :func:`solve_layer`, float32
    and already checked; `solve` runs the solver where it is not to run here.
    """
    blocks = tuple(len(weight) for weight in weights)
    problem = Problem(
        torch.cat(list(weights)), hessian, absolute_damping(damping, hessian), pattern, blocks
    )
    if pattern.density == 1.0:
        weight, mask = problem.weight, torch.ones_like(problem.weight, dtype=torch.bool)
    else:
        weight, mask = solver.solve(problem) if solve is None else solve(solver, problem)
    if not bool(weight.isfinite().all()):
        raise SolverError(
            f"{type(solver).__name__} ended with weights that are not finite at damping "
            f"{damping:g}: raise the damping"
        )
    excess = squared_norms(weight - problem.weight, hessian).split(blocks)
    energy = squared_norms(problem.weight, hessian).split(blocks)
    return [
        Solution(sparse, kept, float(lost.sum()), float(whole.sum()))
        for sparse, kept, lost, whole in zip(
            weight.split(blocks), mask.split(blocks), excess, energy, strict=True
        )
    ]


def _check(weight: torch.Tensor, hessian: torch.Tensor, cross: torch.Tensor | None) -> None:
    if weight.ndim != 2 or not weight.numel():
        raise DataError(f"weight: expected a matrix (out, in), got shape {tuple(weight.shape)}")
    square = (weight.shape[1], weight.shape[1])
    for name, tensor in (("weight", weight), ("hessian", hessian), ("cross_gram", cross)):
        if tensor is None:
            continue
        if name != "weight" and tuple(tensor.shape) != square:
            raise DataError(f"{name}: expected shape {square}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise DataError(f"{name}: expected a floating dtype, got {tensor.dtype}")
        if not bool(tensor.isfinite().all()):
            raise DataError(f"{name}: holds NaN or Inf")
    if not torch.allclose(hessian, hessian.T, rtol=1e-3, atol=1e-5 * float(hessian.abs().max())):
        raise DataError("hessian: not symmetric")


def _as_torch(array: torch.Tensor | NDArray[np.generic]) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array.detach()
    return torch.from_numpy(np.array(array))  # a copy: read-only arrays are welcome


def _like(tensor: torch.Tensor, model: Array, *, mask: bool = False) -> Array:
    if isinstance(model, torch.Tensor):
        return tensor if mask else tensor.to(model.dtype)
    array: NDArray[np.generic] = tensor.cpu().numpy()
    return array if mask else array.astype(model.dtype)
