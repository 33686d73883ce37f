"""Search an order of inputs under which an N:M pattern removes less.

A pattern N:M keeps the N largest scores in every M consecutive inputs, so it loses where large
scores share a group. Exchanging inputs between groups finds better company (Pool, Yu: "Channel
Permutations for N:M Sparsity", NeurIPS 2021, exchange two columns at a time). Here every round
draws one input from each group and makes many exchanges at once:

1. Group `g` without its drawn input keeps `a`, the sum of its N - 1 largest scores, and has `b`,
   the Nth, in each row. With input `h` in the free place it keeps `a + max(b, s_h)`.
2. Summed over rows, `max(b, s) = (b + s + |b − s|) / 2`: what every group keeps with every drawn
   input is one matrix of L1 distances.
3. Pairs of groups that are each other's best exchange are exchanged; that repeats until none gains.

Differences from the paper: scores are those of OBS, `w² / [H⁻¹]_jj`, not magnitudes, and exchanges
are made in parallel instead of one after the other.
"""

from __future__ import annotations

import torch

from iobs_onnx.sparsity import NM

# Rows that are looked at where there are more: the matrix of distances costs groups² × rows.
_ROWS = 2048
_ROUNDS = 400
# The search ends after so many rounds that gain less than this fraction of all scores; where there
# are few groups a round tries little, and it goes on for longer.
_PATIENCE, _LEAST_GAIN = 6, 1e-4


def search_order(scores: torch.Tensor, pattern: NM, *, seed: int = 0) -> torch.Tensor:
    """Return an order of the inputs under which the pattern keeps more of the scores.

    Args:
        scores: `(rows, in)`, what removing each weight costs, not negative; M divides `in`.
        pattern: kept weights; groups are M consecutive inputs.
        seed: of the draws.

    Returns:
        `(in,)` int64; position `i` is to hold input `order[i]`. Where nothing is gained it is
        `0, 1, 2, ...`.
    """
    inputs = scores.shape[1]
    groups = torch.arange(inputs, device=scores.device).reshape(-1, pattern.m)
    if pattern.n == pattern.m or len(groups) < 2:
        return groups.flatten()
    noise = torch.Generator().manual_seed(seed)
    if len(scores) > _ROWS:
        scores = scores[torch.randperm(len(scores), generator=noise)[:_ROWS].to(scores.device)]
    columns = scores.T.contiguous()  # (in, rows)
    total = float(columns.sum())
    patience = max(_PATIENCE, 8 * pattern.m**2 // len(groups))
    idle = 0
    for _ in range(_ROUNDS):
        drawn = torch.randint(pattern.m, (len(groups),), generator=noise).to(scores.device)
        gained = _exchange(columns, groups, drawn, pattern)
        idle = 0 if gained > _LEAST_GAIN * total else idle + 1
        if idle == patience:
            break
    return groups.flatten()


def kept_scores(scores: torch.Tensor, pattern: NM) -> float:
    """Return the sum of the scores that the pattern keeps with the inputs as they are."""
    groups = scores.unflatten(-1, (-1, pattern.m))
    return float(groups.topk(pattern.n, dim=-1).values.sum(dtype=torch.float64))


def _exchange(
    columns: torch.Tensor, groups: torch.Tensor, drawn: torch.Tensor, pattern: NM
) -> float:
    """Exchange the drawn inputs between groups, in place; return how much more is kept."""
    count = len(groups)
    everyone = torch.arange(count, device=groups.device)
    rest = groups[torch.arange(pattern.m, device=groups.device) != drawn[:, None]]
    others = columns[rest.reshape(count, pattern.m - 1)]  # (groups, M - 1, rows)
    top = others.topk(pattern.n, dim=1).values
    sums, border = top[:, :-1].sum((1, 2)), top[:, -1]  # `a` over all rows, `b`
    single = columns[groups[everyone, drawn]]  # (groups, rows)
    distance = torch.cdist(border, single, p=1.0)
    kept = sums[:, None] + (border.sum(1)[:, None] + single.sum(1) + distance) / 2
    own = kept.diagonal()
    gain = kept + kept.T - own[:, None] - own
    gain.fill_diagonal_(-torch.inf)
    gained = 0.0
    while True:
        best, partner = gain.max(1)
        # Rounding must not pass for a gain, or the search would never settle.
        sure = best > 1e-6 * own.abs()
        first = everyone[(partner[partner] == everyone) & sure & sure[partner]]
        first = first[first < partner[first]]
        if not len(first):
            return gained
        second = partner[first]
        gained += float(best[first].sum())
        here, there = (first, drawn[first]), (second, drawn[second])
        groups[here], groups[there] = groups[there].clone(), groups[here].clone()
        done = torch.cat([first, second])
        gain[done] = -torch.inf
        gain[:, done] = -torch.inf
