"""Exact least squares on a given support."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from iobs_onnx.errors import SolverError
from iobs_onnx.solvers.problem import Problem, Sparse


def refit(
    weight: torch.Tensor,
    mask: torch.Tensor,
    start: torch.Tensor,
    hessian: torch.Tensor,
    *,
    tolerance: float = 1e-4,
) -> torch.Tensor:
    """Minimise `½ tr((X − W) H (X − W)ᵀ)` over `X` that vanish outside the mask.

    Conjugate gradients on all outputs at once, with Jacobi preconditioning. Tensors are
    **transposed**, `(in, out)`: that is how the solvers that refit keep them.

    Args:
        weight: `Wᵀ`, `(in, out)` float32.
        mask: `(in, out)` bool, True = kept.
        start: `(in, out)`, where the iteration starts; masked here.
        hessian: `(in, in)` float32, positive definite.
        tolerance: the gradient on the support is at most this relative to `‖H Wᵀ‖`.

    Raises:
        SolverError: `H` is so ill-conditioned that the gradient does not become that small.
    """
    enough = tolerance * float((hessian @ weight).norm())
    least = float("inf")
    for count, (x, residual) in enumerate(_descend(weight, mask, start, hessian)):
        gradient = float(residual.norm())
        if gradient <= enough:
            return x
        least = min(least, gradient)
        if count >= _MOST:
            break
    raise SolverError(
        f"the refit ended after {_MOST} iterations with a relative gradient of "
        f"{tolerance * least / enough:.1e}, over {tolerance:.0e}: raise the damping"
    )


def refitted(problem: Problem, mask: torch.Tensor, tolerance: float) -> Sparse:
    """Return the weights that are optimal on a mask `(out, in)`, as :func:`refit` finds them.

    It starts at the dense weight, where every output is optimal without the mask.

    Raises:
        SolverError: as :func:`refit`.
    """
    dense, kept = problem.weight.T.contiguous(), mask.T.contiguous()
    weight = refit(dense, kept, dense, problem.damped, tolerance=tolerance)
    return Sparse(weight.T.contiguous(), mask)


def refine(
    weight: torch.Tensor, mask: torch.Tensor, start: torch.Tensor, hessian: torch.Tensor, steps: int
) -> torch.Tensor:
    """Take so many of the steps of :func:`refit`, or fewer where the optimum is reached."""
    for count, (x, residual) in enumerate(_descend(weight, mask, start, hessian)):
        if count >= steps or not bool(residual.any()):
            return x
    raise AssertionError("the descent has no end of its own")


def _descend(
    weight: torch.Tensor, mask: torch.Tensor, start: torch.Tensor, hessian: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the iterate, updated in place, and the descent direction on its support."""
    scale = mask / hessian.diagonal()[:, None]
    x = start * mask
    residual = (hessian @ (weight - x)) * mask
    preconditioned = residual * scale
    direction = preconditioned.clone()
    descent = (residual * preconditioned).sum(0)
    while True:
        yield x, residual
        image = (hessian @ direction) * mask
        step = descent / (direction * image).sum(0).clamp_min(_TINY)
        x += step * direction
        residual -= step * image
        preconditioned = residual * scale
        previous, descent = descent, (residual * preconditioned).sum(0)
        direction.mul_(descent / previous.clamp_min(_TINY)).add_(preconditioned)


# Far more than layers need under 1 % of damping, some 20; float32 ends sooner or not at all.
_MOST = 1000
_TINY = torch.finfo(torch.float32).tiny
