"""k-IHT, Topk-I-OBS and I-OBS: a step, and a projection onto at most k non-zeros.

With `H = ∇²f(w_t) + λI` and the dense step `w⁺ = w_t − η H⁻¹ ∇f(w_t)`:

===========  =====================  ===================================================
algorithm    H in the dense step    projection of `w⁺`
===========  =====================  ===================================================
k-IHT        L I                    the k largest
Topk-I-OBS   the Hessian            the k largest
I-OBS        the Hessian            least `‖w − w⁺‖²_H` among vectors with k non-zeros
===========  =====================  ===================================================

So each step of I-OBS minimises the quadratic model of `f` at `w_t` over k-sparse vectors
(exactly up to `exhaustive_up_to` weights, greedily beyond); Topk-I-OBS drops the metric in
the projection. Paper: arXiv:2408.17163.
"""

from __future__ import annotations

import torch
from torch import Tensor

from iobs_onnx.errors import OptionError, SolverError
from iobs_onnx.recovery.objective import Objective
from iobs_onnx.recovery.run import DEFAULTS, Callback, Options, Recovery, check_problem, iterate
from iobs_onnx.recovery.support import compensate, hard_threshold, obs_support

MOST_EXHAUSTIVE = 20


def k_iht(
    objective: Objective,
    start: Tensor,
    k: int,
    *,
    lipschitz: float | None = None,
    options: Options = DEFAULTS,
    target: Tensor | None = None,
    callback: Callback | None = None,
) -> Recovery:
    """Run k-IHT: `w_{t+1}` = the k largest of `w_t − η/(L + λ) ∇f(w_t)`.

    Args:
        objective: only its value and gradient are used.
        start: `w_0`, `(d,)`, floating; not modified, and free to be dense.
        k: the most non-zeros, 1 to d.
        lipschitz: L; by default the objective's own.
        options: learning rate, damping (here λ = damping · L), stopping rule.
        target: a known solution, `(d,)`, that the trace measures the distance to.
        callback: sees every iterate; returning True ends the run.

    Raises:
        OptionError: for a bad k, or where neither `lipschitz` nor the objective tells L.
        DataError: when start or target has the wrong shape.
    """
    check_problem(start, k, target)
    if lipschitz is None:
        if objective.lipschitz is None:
            raise OptionError("lipschitz: this objective states no constant L; pass a bound")
        lipschitz = objective.lipschitz()
    if not lipschitz > 0:
        raise OptionError(f"lipschitz {lipschitz:g}: must be positive")
    step = options.learning_rate / (lipschitz * (1 + options.damping))

    def move(w: Tensor, gradient: Tensor) -> Tensor:
        return hard_threshold(w - step * gradient, k)

    return iterate(objective, start, move, options=options, target=target, callback=callback)


def topk_iobs(
    objective: Objective,
    start: Tensor,
    k: int,
    *,
    options: Options = DEFAULTS,
    target: Tensor | None = None,
    callback: Callback | None = None,
) -> Recovery:
    """Run Topk-I-OBS: `w_{t+1}` = the k largest of `w_t − η (∇²f(w_t) + λI)⁻¹ ∇f(w_t)`.

    Args:
        objective: value, gradient, and Hessian or Hessian solve.
        start: `w_0`, `(d,)`, floating; not modified, and free to be dense.
        k: the most non-zeros, 1 to d.
        options: learning rate, damping (λ = damping · mean|diag ∇²f|), stopping rule.
        target: a known solution, `(d,)`, that the trace measures the distance to.
        callback: sees every iterate; returning True ends the run.

    Raises:
        OptionError: for a bad k, or an objective with neither Hessian nor solve.
        DataError: when start or target has the wrong shape.
        SolverError: when the damped Hessian is not positive definite.
    """
    check_problem(start, k, target)
    curvature = _Curvature(objective, options.damping)

    def move(w: Tensor, gradient: Tensor) -> Tensor:
        newton = curvature.solve(w, gradient)
        return hard_threshold(w - options.learning_rate * newton, k)

    return iterate(objective, start, move, options=options, target=target, callback=callback)


def iobs(
    objective: Objective,
    start: Tensor,
    k: int,
    *,
    exhaustive_up_to: int = 12,
    options: Options = DEFAULTS,
    target: Tensor | None = None,
    callback: Callback | None = None,
) -> Recovery:
    """Run I-OBS: Newton step to `w⁺`, OBS choice of the removed set S, compensation.

    S minimises `w⁺_Sᵀ ([H⁻¹]_SS)⁻¹ w⁺_S` and `w_{t+1} = w⁺ − H⁻¹_{:,S} ([H⁻¹]_SS)⁻¹ w⁺_S`.
    A step costs `d³`: on its quadratic model the support is fixed by `w⁺` alone, so it is
    the objective that is not quadratic, or a learning rate below 1, that needs many.

    Args:
        objective: value, gradient, and Hessian or Hessian solve (of the d × d identity).
        start: `w_0`, `(d,)`, floating; not modified, and free to be dense.
        k: the most non-zeros, 1 to d.
        exhaustive_up_to: up to this d (at most 20) every support is tried; beyond it S is
            grown greedily.
        options: learning rate, damping (λ = damping · mean|diag ∇²f|), stopping rule.
        target: a known solution, `(d,)`, that the trace measures the distance to.
        callback: sees every iterate; returning True ends the run.

    Raises:
        OptionError: for a bad k or `exhaustive_up_to`, or an objective with neither Hessian
            nor solve.
        DataError: when start or target has the wrong shape.
        SolverError: when the damped Hessian is not positive definite.
    """
    check_problem(start, k, target)
    if not 0 <= exhaustive_up_to <= MOST_EXHAUSTIVE:
        raise OptionError(
            f"exhaustive_up_to {exhaustive_up_to}: must be from 0 to {MOST_EXHAUSTIVE}; "
            "the number of supports doubles with every weight"
        )
    curvature = _Curvature(objective, options.damping)

    def move(w: Tensor, gradient: Tensor) -> Tensor:
        inverse = curvature.solve(w, torch.eye(len(w), dtype=w.dtype, device=w.device))
        dense = w - options.learning_rate * (inverse @ gradient)
        kept = obs_support(dense, inverse, k, exhaustive_up_to=exhaustive_up_to)
        return compensate(dense, inverse, kept)

    return iterate(objective, start, move, options=options, target=target, callback=callback)


class _Curvature:
    """Solves with the damped Hessian, factorised again only when it is another tensor."""

    def __init__(self, objective: Objective, damping: float) -> None:
        if objective.hessian is None and objective.solve is None:
            raise OptionError("objective: a second-order step needs its hessian or its solve")
        self._objective = objective
        self._damping = damping
        self._hessian: Tensor | None = None
        self._factor: Tensor | None = None

    def solve(self, w: Tensor, rhs: Tensor) -> Tensor:
        """Return `(∇²f(w) + λI)⁻¹ rhs`, `rhs` `(d,)` or `(d, m)`."""
        if self._objective.solve is not None:
            return self._objective.solve(w, rhs, self._damping)
        columns = rhs.unsqueeze(1) if rhs.ndim == 1 else rhs
        return torch.cholesky_solve(columns, self._factorised(w)).reshape(rhs.shape)

    def _factorised(self, w: Tensor) -> Tensor:
        assert self._objective.hessian is not None  # the constructor saw one of the two
        hessian = self._objective.hessian(w)
        if self._factor is None or hessian is not self._hessian:
            damped = hessian.clone()
            # The size, so that damping also lifts a Hessian that is not positive.
            damped.diagonal().add_(self._damping * hessian.diagonal().abs().mean())
            factor, failed = torch.linalg.cholesky_ex(damped)
            if failed:
                raise SolverError(
                    f"recovery: the Hessian is not positive definite at damping "
                    f"{self._damping:g}; raise damping, or start nearer to a minimum"
                )
            self._hessian, self._factor = hessian, factor
        return self._factor
