"""What a change of weights costs: `x H xᵀ`, its squared norm in the metric of `H`."""

from __future__ import annotations

import torch


def quadratic(rows: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return `x H xᵀ` for each row `x` of `(out, in)`, in its dtype: what searches compare by."""
    return ((rows @ hessian) * rows).sum(1)


def quadratic_of_columns(columns: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return `xᵀ H x` for each column `x` of `(in, out)`, as some searches keep their weights."""
    return ((hessian @ columns) * columns).sum(0)


def squared_norms(rows: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Return `x H xᵀ` for each row `x` of `(out, in)`, float64; rounding below 0 is cut off.

    This is what is reported: the errors of layers, their energies and bounds.
    """
    return ((rows @ hessian) * rows).sum(1, dtype=torch.float64).clamp_min(0)


def squared_norm(weight: torch.Tensor, hessian: torch.Tensor) -> float:
    """Return `tr(W H Wᵀ)`, summed in float64 over all groups; rounding below 0 is cut off.

    Args:
        weight: `W`, `(out, in)` or `(groups, out, in)`.
        hessian: `H`, `(in, in)` or one for each group.
    """
    return max(float(((weight @ hessian) * weight).sum(dtype=torch.float64)), 0.0)
