"""What is minimised: an objective as functions, and four that are often wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from iobs_onnx.errors import DataError, OptionError


@dataclass(frozen=True)
class Objective:
    """A function `f` of `w`, `(d,)`, and its derivatives.

    Attributes:
        evaluate: `w` to (`f(w)`, `∇f(w)`), shapes `()` and `(d,)`: together, because they
            nearly always share their costliest product.
        hessian: `w` to `∇²f(w)`, `(d, d)`. An objective whose Hessian is constant returns
            the same tensor each time, and it is factorised once.
        solve: `(w, rhs, damping)` to `(∇²f(w) + λI)⁻¹ rhs`, `rhs` `(d,)` or `(d, m)`, where
            λ = damping · mean|diag ∇²f(w)|; taken in place of `hessian` where both are given.
        lipschitz: the Lipschitz constant of `∇f`, a bound on the eigenvalues of `∇²f(w)` for
            every `w`. A function, because it costs an eigenvalue problem that only
            :func:`~iobs_onnx.recovery.k_iht` needs.
    """

    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]]
    hessian: Callable[[Tensor], Tensor] | None = None
    solve: Callable[[Tensor, Tensor, float], Tensor] | None = None
    lipschitz: Callable[[], float] | None = None


def quadratic(hessian: Tensor, minimiser: Tensor, minimum: float | Tensor = 0.0) -> Objective:
    """Return `f(w) = minimum + ½ (w − minimiser)ᵀ H (w − minimiser)`.

    Written around its minimiser, the loss keeps its relative accuracy however small it gets,
    where `½wᵀHw − bᵀw + c` would drown in rounding.

    Args:
        hessian: `H`, `(d, d)`, symmetric, positive semidefinite.
        minimiser: `(d,)`; where `H` is singular, any of them.
        minimum: `f(minimiser)`.

    Raises:
        DataError: when the shapes do not fit or a value is not finite.
    """
    if hessian.shape != (*minimiser.shape, *minimiser.shape) or minimiser.ndim != 1:
        raise DataError(
            f"quadratic: a Hessian {tuple(hessian.shape)} does not fit a minimiser "
            f"{tuple(minimiser.shape)}; (d, d) and (d,) are required"
        )
    _require_finite("quadratic", hessian, minimiser)

    def evaluate(w: Tensor) -> tuple[Tensor, Tensor]:
        offset = w - minimiser
        gradient = hessian @ offset
        return minimum + offset.dot(gradient) / 2, gradient

    return Objective(
        evaluate, hessian=lambda _: hessian, lipschitz=lambda: _largest_eigenvalue(hessian)
    )


def least_squares(x: Tensor, y: Tensor, *, dtype: torch.dtype = torch.float64) -> Objective:
    """Return the mean squared error `f(w) = ‖Xw − y‖² / n`, with Hessian `(2/n) XᵀX`.

    `XᵀX` is formed once; an evaluation costs `d²`, whatever `n`.

    Args:
        x: `(n, d)`, n observations; fewer than d make the Hessian singular.
        y: `(n,)`.
        dtype: what everything is computed in.

    Raises:
        DataError: when the shapes do not fit or a value is not finite.
    """
    x, y = _observations("least_squares", x, y, dtype)
    # gelsd also serves a rank-deficient X; it is LAPACK's, so the CPU's.
    fit = torch.linalg.lstsq(x.cpu(), y.cpu().unsqueeze(1), driver="gelsd").solution
    fit = fit.squeeze(1).to(x.device)
    minimum = (x @ fit - y).square().mean()
    return quadratic(x.mT @ x * (2 / len(x)), fit, minimum)


def logistic(
    x: Tensor, y: Tensor, *, ridge: float = 0.0, dtype: torch.dtype = torch.float64
) -> Objective:
    """Return the logistic loss `f(w) = mean(log(1 + e^z) − y z) + ½ ridge ‖w‖²`, `z = Xw`.

    Its Hessian is `Xᵀ diag(σ(z)(1 − σ(z))) X / n + ridge I`. Separable data have no minimum
    without a ridge.

    Args:
        x: `(n, d)`.
        y: `(n,)`, probabilities of class 1: 0, 1 or between.
        ridge: at least 0.
        dtype: what everything is computed in.

    Raises:
        DataError: when the shapes do not fit, or a value is not finite or a label not in [0, 1].
        OptionError: when `ridge` is negative.
    """
    x, y = _observations("logistic", x, y, dtype)
    if y.min() < 0 or y.max() > 1:
        raise DataError("logistic: labels y must lie in [0, 1]; map the classes to 0 and 1")
    if not ridge >= 0:
        raise OptionError(f"ridge {ridge:g}: must be at least 0")
    n, d = x.shape
    eye = torch.eye(d, dtype=dtype, device=x.device)

    def evaluate(w: Tensor) -> tuple[Tensor, Tensor]:
        z = x @ w
        value = (softplus(z) - y * z).mean() + ridge / 2 * w.dot(w)
        return value, x.mT @ (z.sigmoid() - y) / n + ridge * w

    def hessian(w: Tensor) -> Tensor:
        p = (x @ w).sigmoid()
        return x.mT @ ((p * (1 - p) / n).unsqueeze(1) * x) + ridge * eye

    # σ(1 − σ) ≤ 1/4.
    return Objective(
        evaluate, hessian, lipschitz=lambda: _largest_eigenvalue(x.mT @ x) / (4 * n) + ridge
    )


def quadratic_regression(x: Tensor, y: Tensor, *, dtype: torch.dtype = torch.float64) -> Objective:
    """Return `f(w) = mean((z² − y)²) / 4`, `z = Xw`: real phase retrieval by least squares.

    The model is `y = (xᵀw)²`: each observation tells the size of `xᵀw`, not its sign. The
    gradient is `Xᵀ((z² − y) z) / n`, the Hessian `Xᵀ diag(3z² − y) X / n`. So
    `f(w) = f(−w)`, there is no Lipschitz constant, 0 is stationary, and away from `±w` the
    Hessian can be indefinite: second-order steps want a start near a solution, or damping.

    Args:
        x: `(n, d)`.
        y: `(n,)`.
        dtype: what everything is computed in.

    Raises:
        DataError: when the shapes do not fit or a value is not finite.
    """
    x, y = _observations("quadratic_regression", x, y, dtype)
    n = len(x)

    def evaluate(w: Tensor) -> tuple[Tensor, Tensor]:
        z = x @ w
        residual = z.square() - y
        return residual.square().mean() / 4, x.mT @ (residual * z) / n

    def hessian(w: Tensor) -> Tensor:
        curvature = 3 * (x @ w).square() - y
        return x.mT @ ((curvature / n).unsqueeze(1) * x)

    return Objective(evaluate, hessian)


def _observations(name: str, x: Tensor, y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if x.ndim != 2 or y.shape != x.shape[:1] or not x.numel():
        raise DataError(
            f"{name}: x {tuple(x.shape)} and y {tuple(y.shape)} do not fit; "
            "(n, d) and (n,), neither empty, are required"
        )
    _require_finite(name, x, y)
    return x.to(dtype), y.to(dtype)


def _require_finite(name: str, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise DataError(f"{name}: the data hold NaN or Inf; remove those observations")


def _largest_eigenvalue(symmetric: Tensor) -> float:
    return float(torch.linalg.eigvalsh(symmetric)[-1])
