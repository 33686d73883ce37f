"""Choose which weights stay: by size, or by Optimal Brain Surgeon cost.

`H⁻¹` is `(d, d)`, masks are `(d,)`, True = kept, S is the removed set.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor


def hard_threshold(w: Tensor, k: int) -> Tensor:
    """Return `w` with all but its `k` largest entries by size set to 0."""
    kept = w.abs().topk(k, sorted=False).indices
    return torch.zeros_like(w).index_copy_(0, kept, w[kept])


def obs_support(w: Tensor, inverse: Tensor, k: int, *, exhaustive_up_to: int) -> Tensor:
    """Return the mask of `k` kept weights that minimises the OBS cost of removing the rest.

    The cost `w_Sᵀ ([H⁻¹]_SS)⁻¹ w_S` is twice what the quadratic with Hessian `H` and
    minimiser `w` gains when `w_S` is set to 0 and the others are moved to make up for it.
    Up to `exhaustive_up_to` weights every support is tried; beyond, the set is grown
    greedily, one weight after another, each time with compensation.
    """
    if k == len(w):
        return torch.ones_like(w, dtype=torch.bool)
    choose = _exhaustive if len(w) <= exhaustive_up_to else _greedy
    return choose(w, inverse, k)


def compensate(w: Tensor, inverse: Tensor, kept: Tensor) -> Tensor:
    """Set the removed weights to 0 and move the kept ones to their optimum.

    `w − H⁻¹_{:,S} ([H⁻¹]_SS)⁻¹ w_S`: the minimiser, on the kept support, of the quadratic
    with Hessian `H` and minimiser `w`.
    """
    removed = (~kept).nonzero().squeeze(1)
    multipliers = torch.linalg.solve(inverse[removed][:, removed], w[removed])
    return (w - inverse[:, removed] @ multipliers).masked_fill(~kept, 0.0)


def _greedy(w: Tensor, inverse: Tensor, k: int) -> Tensor:
    """Remove the weight of least `w_p² / [H⁻¹]_pp`, update `w` and `H⁻¹`, again until k stay."""
    w, inverse = w.clone(), inverse.clone()
    kept = torch.ones_like(w, dtype=torch.bool)
    for _ in range(len(w) - k):
        costs = (w.square() / inverse.diagonal()).masked_fill(~kept, torch.inf)
        p = int(costs.argmin())
        column = inverse[:, p] / inverse[p, p].sqrt()
        w -= column * (w[p] / inverse[p, p].sqrt())
        inverse -= column.outer(column)
        kept[p] = False
    return kept


def _exhaustive(w: Tensor, inverse: Tensor, k: int) -> Tensor:
    d = len(w)
    removed = torch.tensor(list(combinations(range(d), d - k)), device=w.device)
    blocks = inverse[removed.unsqueeze(2), removed.unsqueeze(1)]
    costs = (w[removed] * torch.linalg.solve(blocks, w[removed])).sum(dim=1)
    return torch.ones_like(w, dtype=torch.bool).index_fill_(0, removed[costs.argmin()], False)
