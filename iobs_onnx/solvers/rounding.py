"""Round a sparse weight to an integer grid, letting what is not yet rounded make up for the rest.

Rounding one weight after the other, each time moving the others to where they are optimal given
what was rounded, is GPTQ (Frantar et al., 2023, algorithm 1) and, on the Cholesky factor of the
Hessian, Babai's nearest plane (1986). Differences from GPTQ:

1. The weights are those of a support: each output has a Hessian of its own, that of its kept
   inputs, and nothing that was pruned comes back.
2. It starts from the minimiser on the support, so that what the solver left is made up for too.
3. No inverse of the Hessian is formed: with `H_SS = RᵀR` the compensation is a back substitution.
4. Inputs are taken in the order of their second moment, the largest first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from iobs_onnx.errors import SolverError

# Floats in the factors of the outputs that are rounded together on the CPU; on CUDA, where every
# step over a column costs a launch, a share of the free memory, for the factors and their copies.
_CHUNK = 2**26
_COPIES = 4
# Columns that are rounded before what they owe is passed on to all others in one product.
_BLOCK = 64


class Rounded(NamedTuple):
    """Integers `(out, in)`, int8, zero where the mask is False, and steps `(out,)` float32."""

    codes: torch.Tensor
    step: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """What the integers stand for, `(out, in)` float32."""
        return self.codes.float() * self.step[:, None]


def nearest(weight: torch.Tensor, step: torch.Tensor, limit: int = 127) -> Rounded:
    """Round each weight to the nearest multiple of its output's step.

    Args:
        weight: `(out, in)` float32.
        step: `(out,)` float32, positive.
        limit: the largest integer; `-limit` is the smallest.
    """
    codes = (weight / step[:, None]).round().clamp(-limit, limit)
    return Rounded(codes.to(torch.int8), step)


def steps(weight: torch.Tensor, limit: int = 127) -> torch.Tensor:
    """Return the step of each output, `(out,)`, at which its largest weight is `limit`."""
    largest = weight.abs().amax(dim=1)
    return torch.where(largest > 0, largest / limit, torch.ones_like(largest))


def round_compensated(
    weight: torch.Tensor,
    mask: torch.Tensor,
    aim: torch.Tensor,
    hessian: torch.Tensor,
    step: torch.Tensor,
    limit: int = 127,
) -> Rounded:
    """Round the kept weights so that `tr((Q − A) H (Q − A)ᵀ)` stays small.

    Args:
        weight: the sparse weight, `(out, in)` float32.
        mask: of the kept weights, `(out, in)`.
        aim: `A`, `(out, in)`.
        hessian: `H`, `(in, in)`, damped.
        step: of each output's grid, `(out,)`.
        limit: the largest integer.

    Raises:
        SolverError: the Hessian of a support is not positive definite.
    """
    codes = torch.zeros_like(weight, dtype=torch.int8)
    widest = int(mask.sum(dim=1).max())
    if widest == 0:
        return Rounded(codes, step)
    gradient = (aim - weight) @ hessian
    # Last are those of the largest second moment: substitution goes backwards.
    ranks = hessian.diagonal().argsort().argsort().expand_as(mask)
    order = torch.where(mask, ranks, ranks - len(hessian)).argsort(dim=1)[:, -widest:]
    kept = mask.gather(1, order)
    size = max(1, _chunk(weight.device) // widest**2)
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        chosen, valid = order[rows], kept[rows]
        factor = _factors(hessian, chosen, valid)
        pull = torch.where(valid, gradient[rows].gather(1, chosen), 0)
        best = torch.cholesky_solve(pull.unsqueeze(-1), factor).squeeze(-1)
        best += torch.where(valid, weight[rows].gather(1, chosen), 0)
        found = _substitute(best, factor, step[rows], limit)
        codes[rows] = codes[rows].scatter(1, chosen, torch.where(valid, found, 0))
    return Rounded(codes, step)


def _chunk(device: torch.device) -> int:
    """Return how many floats the factors of a chunk may have."""
    if device.type != "cuda":
        return _CHUNK
    free, _ = torch.cuda.mem_get_info(device)
    return max(_CHUNK, free // 4 // (2 * _COPIES))


def _factors(hessian: torch.Tensor, chosen: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return lower Cholesky factors `(rows, k, k)` of each support; identity where not valid."""
    parts = hessian[chosen.unsqueeze(-1), chosen.unsqueeze(-2)]
    if not bool(valid.all()):
        parts *= valid.unsqueeze(-1) & valid.unsqueeze(-2)
        parts.diagonal(dim1=1, dim2=2).add_((~valid).float())
    # LAPACK works column by column: an upper factor comes with the rows of the lower contiguous.
    factor, info = torch.linalg.cholesky_ex(parts, upper=True)
    if bool(info.any()):
        raise SolverError(
            "the Hessian of the kept weights is not positive definite: raise the damping or "
            "calibrate on more samples"
        )
    return factor.mT


def _substitute(
    best: torch.Tensor, factor: torch.Tensor, step: torch.Tensor, limit: int
) -> torch.Tensor:
    """Round from the last column to the first; return integers, int8.

    With `H_SS = L Lᵀ` and `d = w − q`, the objective is `‖Lᵀ d‖²`, whose row `t` holds
    `L_tt d_t + Σ_{i>t} L_it d_i`: so `q_t` is the rounding of `w_t + Σ_{i>t} L_it d_i / L_tt`.
    """
    codes = torch.empty_like(best, dtype=torch.int8)
    owed, left = torch.zeros_like(best), torch.empty_like(best)
    for stop in range(best.shape[1], 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        for column in range(stop - 1, start - 1, -1):
            row = factor[:, column]
            wanted = best[:, column] + owed[:, column] / row[:, column]
            code = (wanted / step).round_().clamp_(-limit, limit)
            codes[:, column] = code.to(torch.int8)
            left[:, column] = best[:, column] - code * step
            owed[:, start:column].addcmul_(row[:, start:column], left[:, column, None])
        block = left[:, start:stop].unsqueeze(1)
        owed[:, :start] += torch.bmm(block, factor[:, start:stop, :start]).squeeze(1)
    return codes
