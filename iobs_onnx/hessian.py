"""The Hessian of a layer's squared error: `H = XᵀX / n`, accumulated batch by batch.

`X`, `(n, in)`, holds one row for each token, pixel or patch the layer multiplies. All functions
take and return torch tensors and never change their arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Cross:
    """`LᵀX / n` of two sets of rows, and the mean of the rows of `L`.

    Attributes:
        matrix: float32, `(groups, out, in)`.
        mean: float32, `(groups, out)`.
    """

    matrix: torch.Tensor
    mean: torch.Tensor


@dataclass(frozen=True)
class Hessian:
    """`H = X_sᵀX_s / n` of one activation, and how far the dense model's `X_d` is from it.

    Attributes:
        matrix: float32, `(groups, in, in)`, symmetric, both halves filled.
        rows: the number of rows of `X_s` that went in, per group.
        weight: how much these rows weigh together; `rows` where each counts once.
        mean: mean of the rows of `X_s`, float32, `(groups, in)`.
        drift: `C − H = (X_d − X_s)ᵀX_s / n`; None where `X_d` is `X_s`.
        shares: how the rows fall to the groups where they are dealt out to them, `(groups,)`
            float64, of which `rows` is then the sum; None where all groups have all rows.
    """

    matrix: torch.Tensor
    rows: int
    weight: float
    mean: torch.Tensor
    drift: Cross | None = None
    shares: torch.Tensor | None = None

    @property
    def thin_groups(self) -> int:
        """Number of groups that fewer rows were dealt to than they have inputs."""
        return 0 if self.shares is None else int((self.shares < self.matrix.shape[-1]).sum())


def combine(hessians: Sequence[Hessian]) -> Hessian:
    """Return the Hessian of all rows together, for a weight that several activations meet."""
    if len(hessians) == 1:
        return hessians[0]
    weight = sum(hessian.weight for hessian in hessians)
    shares = [hessian.weight / weight for hessian in hessians]
    drifts = [(h.drift, share) for h, share in zip(hessians, shares, strict=True) if h.drift]
    dealt = [hessian.shares for hessian in hessians if hessian.shares is not None]
    return Hessian(
        _weighted([hessian.matrix for hessian in hessians], shares),
        sum(hessian.rows for hessian in hessians),
        weight,
        _weighted([hessian.mean for hessian in hessians], shares),
        mix(*zip(*drifts, strict=True)) if drifts else None,
        torch.stack(dealt).sum(0) if dealt else None,
    )


def filled(hessian: Hessian) -> Hessian:
    """Give groups that few rows were dealt to a floor: rows of the kind that all groups have.

    A group with fewer rows than inputs gets the mean of all rows' `xxᵀ` as often as rows are
    missing, so that its inputs are told apart. Others stay as they are.
    """
    if hessian.shares is None:
        return hessian
    inputs = hessian.matrix.shape[-1]
    lacking = (inputs - hessian.shares).clamp(min=0) / hessian.rows
    floor = hessian.matrix.sum(0)
    missing = lacking.to(hessian.matrix)[:, None, None]
    return replace(hessian, matrix=hessian.matrix + missing * floor)


def mix(crosses: Sequence[Cross], shares: Sequence[float]) -> Cross:
    """Return the weighted sum; one that is left out counts as zero."""
    return Cross(
        _weighted([cross.matrix for cross in crosses], shares),
        _weighted([cross.mean for cross in crosses], shares),
    )


def _weighted(tensors: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    return torch.stack([t * share for t, share in zip(tensors, shares, strict=True)]).sum(0)


def dead_inputs(matrix: torch.Tensor) -> torch.Tensor:
    """Return the mask `(..., in)` of inputs that were zero in every row: `diag(H) == 0`."""
    return matrix.diagonal(dim1=-2, dim2=-1) == 0


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep float32 products at float32 (no TF32, no bfloat16), whatever the caller has chosen."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)
