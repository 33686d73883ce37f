"""Optimal Brain Surgeon's state on a dominant eigenspace of the Hessian, for wide layers.

Hassibi, Stork, Wolff, Watanabe: "Optimal Brain Surgeon: Extensions and Performance
Comparisons", NIPS 1993, section 4, keep the dominant eigenspace of `H` to save storage and
time; here the rest of `H` is kept too, as its diagonal.
"""

from __future__ import annotations

import torch

from iobs_onnx.errors import OptionError, SolverError
from iobs_onnx.solvers.problem import Problem


class Eigenspace:
    """`H + λI ≈ F Fᵀ + diag(d)` with `F`, `(in, r)`, from the `r` largest eigenvalues of `H`.

    With `M = I + F_Aᵀ diag(d_A)⁻¹ F_A`, `(r, r)`, for the kept set A, column p of the inverse on
    A is `e_p / d_p − diag(d)⁻¹ F M⁻¹ f_p / d_p`.

    Raises:
        OptionError: the rank is not between 1 and `in`.
        SolverError: the remainder is not positive.
    """

    def __init__(self, problem: Problem, rank: int) -> None:
        inputs = len(problem.hessian)
        if not 1 <= rank <= inputs:
            raise OptionError(f"rank {rank}: must be from 1 to the number of inputs, {inputs}")
        values, vectors = torch.linalg.eigh(problem.hessian)
        self.factor = vectors[:, -rank:] * values[-rank:].clamp_min(0).sqrt()
        self.rest = problem.damped.diagonal() - self.factor.square().sum(1)
        if float(self.rest.min()) <= 0:
            raise SolverError(
                f"H + λI with λ = {problem.damping:.3g} is not positive definite beyond rank "
                f"{rank}: raise the damping or lower the rank"
            )
        self.core = (self.factor.T / self.rest) @ self.factor
        self.core.diagonal().add_(1.0)
        self.core = torch.cholesky_inverse(torch.linalg.cholesky(self.core))


class LowRankRows:
    """The state of some rows: kept weights, and what each one's removal would cost.

    A removal costs `in · r + r²` a row.

    Attributes:
        index: `(rows, in)`, which input each column is.
    """

    def __init__(self, space: Eigenspace, weight: torch.Tensor) -> None:
        rows, inputs = weight.shape
        self._space = space
        self._weight = weight.clone()
        self._core = space.core.expand(rows, -1, -1).clone()
        shared = ((space.factor @ space.core) * space.factor).sum(1)
        self._variance = (1.0 / space.rest - shared / space.rest.square()).expand(rows, -1).clone()
        self.index = torch.arange(inputs, device=weight.device).expand(rows, inputs)

    @property
    def costs(self) -> torch.Tensor:
        """Twice what the quadratic grows by when each weight is removed, `(rows, in)`."""
        return self._weight.square() / self._variance

    def remove(self, which: torch.Tensor) -> None:
        """Remove one weight of each row, `(rows,)`."""
        at = which[:, None]
        rest, factor = self._space.rest, self._space.factor
        direction = torch.bmm(self._core, factor[which][:, :, None])
        own = rest[at]
        column = (direction.squeeze(2) @ factor.T) / (-rest * own)
        column.scatter_add_(1, at, 1.0 / own)
        variance = self._variance.gather(1, at)
        self._weight -= column * (self._weight.gather(1, at) / variance)
        self._variance -= column.square() / variance
        scale = (own.square() * variance)[:, :, None]
        self._core.baddbmm_(direction / scale, direction.mT)

    def forget(self, candidates: torch.Tensor) -> torch.Tensor:
        """Keep every column: they are cheap."""
        return candidates
