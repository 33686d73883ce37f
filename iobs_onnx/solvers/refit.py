"""Exact least squares on a given support."""

from __future__ import annotations

import torch


def refit(
    weight: torch.Tensor,
    mask: torch.Tensor,
    start: torch.Tensor,
    hessian: torch.Tensor,
    *,
    tolerance: float = 1e-4,
    iterations: int = 200,
) -> torch.Tensor:
    """Minimise `½ tr((X − W) H (X − W)ᵀ)` over `X` that vanish outside the mask.

    Conjugate gradients on all outputs at once, with Jacobi preconditioning. Tensors are
    **transposed**, `(in, out)`: that is how the solvers that refit keep them.

    Args:
        weight: `Wᵀ`, `(in, out)` float32.
        mask: `(in, out)` bool, True = kept.
        start: `(in, out)`, where the iteration starts; masked here.
        hessian: `(in, in)` float32, positive definite.
        tolerance: stop when the gradient on the support is this small relative to `‖H Wᵀ‖`.
        iterations: stop then in any case.
    """
    target = hessian @ weight
    scale = mask / hessian.diagonal()[:, None]
    x = start * mask
    residual = (target - hessian @ x) * mask
    enough = tolerance * tolerance * float(target.square().sum())
    preconditioned = residual * scale
    direction = preconditioned.clone()
    descent = (residual * preconditioned).sum(0)
    for _ in range(iterations):
        if float(residual.square().sum()) <= enough:
            break
        image = (hessian @ direction) * mask
        step = descent / (direction * image).sum(0).clamp_min(_TINY)
        x += step * direction
        residual -= step * image
        preconditioned = residual * scale
        previous, descent = descent, (residual * preconditioned).sum(0)
        direction.mul_(descent / previous.clamp_min(_TINY)).add_(preconditioned)
    return x


_TINY = torch.finfo(torch.float32).tiny
