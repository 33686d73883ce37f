"""Choose one of several solutions for each output, so that a site's budget is spent exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

# Weights by which outputs may be ahead of the first options, or behind them, on the way.
_REACH = 2048


def allocate(errors: torch.Tensor, counts: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
    """Choose the options of least total error that keep as many weights as the first ones do.

    Outputs share no term of the quadratic, so an output may take its weights from one solution
    and the next from another; only the number of weights ties them together. Exact, by dynamic
    programming over the outputs, as long as partial sums stray less than 2048 weights from
    the first options'.

    Args:
        errors: `(options, out)`, the quadratic of each output.
        counts: `(options, out)` integers, the weights that it keeps.
        blocks: number of outputs of each site; each site's count is that of its first options.

    Returns:
        `(out,)` int64, which option each output takes.
    """
    costs = errors.double().cpu().numpy()
    # Inputs of any number: only the difference to the first option counts.
    changes = (counts - counts[0]).cpu().numpy()
    chosen = np.where(changes == 0, costs, np.inf).argmin(0)
    for rows in np.split(np.arange(costs.shape[1]), np.cumsum(blocks)[:-1]):
        tied = rows[changes[:, rows].any(0)]
        chosen[tied] = _balance(costs[:, tied], changes[:, tied])
    return torch.from_numpy(chosen).to(errors.device)


def _balance(costs: NDArray[np.float64], changes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the options, `(out,)`, of least cost whose changes sum to 0."""
    reach = min(_REACH, int(np.abs(changes).max(0).sum()))
    # least[reach + s]: the least cost of the outputs so far whose changes sum to s.
    least = np.full(2 * reach + 1, np.inf)
    least[reach] = 0.0
    sums = np.arange(2 * reach + 1)
    picks = []
    small = np.min_scalar_type(len(costs))  # there is one pick for every output and sum
    for cost, change in zip(costs.T, changes.T, strict=True):
        before = sums - change[:, None]
        inside = (before >= 0) & (before < len(sums))
        totals = np.where(inside, least[before.clip(0, len(sums) - 1)] + cost[:, None], np.inf)
        picks.append(totals.argmin(0).astype(small))
        least = totals.min(0)
    chosen = np.empty(len(picks), np.int64)
    at = reach
    for row in range(len(picks) - 1, -1, -1):
        chosen[row] = picks[row][at]
        at -= changes[chosen[row], row]
    return chosen
