"""The problem every solver is given, and what it must return."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import torch

from iobs_onnx.errors import SolverError
from iobs_onnx.sparsity import NM, Pattern


class Sparse(NamedTuple):
    """A sparse weight `(out, in)` and its mask (True = kept); zero wherever the mask is False."""

    weight: torch.Tensor
    mask: torch.Tensor


class Solver(Protocol):
    """Frozen dataclass whose fields are the solver's options."""

    def solve(self, problem: Problem) -> Sparse:
        """Return a weight within the pattern; the problem's tensors are not changed."""
        ...


@dataclass(frozen=True)
class Problem:
    """Minimise `½ tr((X − W)(H + λI)(X − W)ᵀ)` over the `X` that fit the pattern.

    Attributes:
        weight: `W`, `(out, in)` float32; sites that read the same tap, stacked.
        hessian: `H`, `(in, in)` float32, symmetric, without damping.
        damping: `λ`, absolute.
        pattern: each block of rows holds the pattern on its own.
        blocks: number of rows of each stacked site; they sum to `out`.
        of: outputs of the whole problem that this is a part of; None where it is whole.
    """

    weight: torch.Tensor
    hessian: torch.Tensor
    damping: float
    pattern: Pattern
    blocks: tuple[int, ...]
    of: int | None = None

    @cached_property
    def damped(self) -> torch.Tensor:
        """`H + λI`."""
        damped = self.hessian.clone()
        damped.diagonal().add_(self.damping)
        return damped

    @cached_property
    def curvature(self) -> torch.Tensor:
        """Diagonal of `H + λI`, `(in,)`, for solvers that divide by it.

        Raises:
            SolverError: where it is not positive.
        """
        diagonal = self.damped.diagonal()
        if not bool((diagonal > 0).all()):
            raise SolverError(
                f"H + λI with λ = {self.damping:.3g} has no curvature for input "
                f"{int(diagonal.argmin())}: raise the damping or calibrate on more samples"
            )
        return diagonal

    @cached_property
    def factor(self) -> torch.Tensor:
        """Lower Cholesky factor of `H + λI`.

        Raises:
            SolverError: where `H + λI` is not positive definite in float32.
        """
        return cholesky(self.damped, f"H + λI with λ = {self.damping:.3g}")

    @cached_property
    def inverse(self) -> torch.Tensor:
        """`(H + λI)⁻¹`.

        Raises:
            SolverError: where `H + λI` is not positive definite in float32.
        """
        return torch.cholesky_inverse(self.factor)

    def on(self, device: torch.device) -> Problem:
        """Return the problem with its tensors on a device."""
        if self.weight.device == self.hessian.device == device:
            return self
        return replace(self, weight=self.weight.to(device), hessian=self.hessian.to(device))

    def project(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the mask of the best scores `(out, in)` that the pattern allows."""
        if isinstance(self.pattern, NM) or len(self.blocks) == 1:  # N:M holds row by row
            return self.pattern.project(scores)
        mask = torch.empty_like(scores, dtype=torch.bool)
        for part, rows in zip(scores.split(self.blocks), mask.split(self.blocks), strict=True):
            rows.copy_(self.pattern.project(part))
        return mask


def cholesky(matrix: torch.Tensor, what: str) -> torch.Tensor:
    """Return the lower Cholesky factor of a symmetric positive definite matrix.

    Raises:
        SolverError: where it is not positive definite; `what` names it in the message.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info):
        raise SolverError(
            f"{what} is not positive definite (pivot {int(info)} of {len(matrix)}): "
            "raise the damping or calibrate on more samples"
        )
    return factor


def inverse(matrix: torch.Tensor, what: str) -> torch.Tensor:
    """Return the inverse of a symmetric positive definite matrix, as :func:`cholesky` raises."""
    return torch.cholesky_inverse(cholesky(matrix, what))
