"""The order of inputs: never worse, near the best where all orders can be tried."""

from itertools import permutations

import pytest
import torch

from iobs_onnx.solvers.permutation import kept_scores, search_order
from iobs_onnx.sparsity import NM


def scores(rows: int, inputs: int, seed: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(inputs, generator=noise))
    return torch.randn(rows, inputs, generator=noise).square() * spread


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4), NM(4, 8), NM(1, 2)])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_more_is_kept_and_every_input_has_one_place(pattern: NM, rows: int) -> None:
    given = scores(rows, 48, seed=rows)
    before = given.clone()
    order = search_order(given, pattern)
    assert sorted(order.tolist()) == list(range(48))
    assert torch.equal(given, before)
    assert kept_scores(given[:, order], pattern) > kept_scores(given, pattern)
    assert torch.equal(order, search_order(given, pattern))


def test_it_comes_near_the_best_of_all_orders() -> None:
    """8 inputs in two groups of 4: 35 ways to part them. Exchanges may end beside the best."""
    pattern, shares = NM(2, 4), []
    for seed in range(20):
        given = scores(6, 8, seed)
        start = kept_scores(given, pattern)
        best = max(
            kept_scores(given[:, torch.tensor(order)], pattern)
            for order in permutations(range(8))
            if order[0] == 0
            and list(order[:4]) == sorted(order[:4])
            and order[4:] == tuple(sorted(order[4:]))
        )
        found = kept_scores(given[:, search_order(given, pattern)], pattern)
        assert start - 1e-6 <= found <= best + 1e-6
        shares.append((found - start) / (best - start) if best > start + 1e-6 else 1.0)
    assert sum(shares) / len(shares) > 0.9


def test_nothing_to_gain_leaves_the_order() -> None:
    identity = torch.arange(8)
    assert torch.equal(search_order(scores(4, 8, 0), NM(4, 4)), identity)
    assert torch.equal(search_order(scores(4, 4, 0), NM(2, 4)), identity[:4])
    assert torch.equal(search_order(torch.ones(4, 8), NM(2, 4)), identity)
