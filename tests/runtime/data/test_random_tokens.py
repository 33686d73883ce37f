"""Random tokens among the feeds: how many, where, and what they weigh."""

import numpy as np
import pytest

from iobs_onnx.runtime import with_random_tokens

LENGTHS = (40, 25, 60)


def feed(seed):
    rng = np.random.default_rng(seed)
    ids = np.zeros((len(LENGTHS), max(LENGTHS)), np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = rng.integers(100, 200, length)
        mask[row, :length] = 1
    return {"ids": ids, "attention_mask": mask, "kinds": np.ones_like(ids)}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_copies_make_up_the_share(count, share):
    feeds = [feed(seed) for seed in range(count)]
    mixed = list(with_random_tokens(feeds, "ids", 1000, share, seed=0))
    assert len(mixed) == count + (count + 1) // 2
    own = [item for item, weight in mixed if any(item is given for given in feeds)]
    assert [id(item) for item in own] == [id(item) for item in feeds]
    weights = {id(item): weight for item, weight in mixed}
    rows = {id(item): item["attention_mask"].sum() for item, _ in mixed}
    copied = sum(weights[i] * rows[i] for i in weights if i not in set(map(id, feeds)))
    total = sum(weights[i] * rows[i] for i in weights)
    assert copied / total == pytest.approx(share)


def test_half_the_inner_tokens_of_a_copy_are_random():
    given = feed(0)
    before = {name: array.copy() for name, array in given.items()}
    (_, _), (copy, _) = with_random_tokens([given], "ids", 1000, 0.3, seed=0)
    for name, array in before.items():
        np.testing.assert_array_equal(given[name], array)
        if name != "ids":
            np.testing.assert_array_equal(copy[name], array)
    changed = copy["ids"] != given["ids"]
    for row, length in enumerate(LENGTHS):
        assert not changed[row, [0, length - 1]].any()  # the marks of its ends
        assert not changed[row, length:].any()
    assert 0.35 < changed.sum() / (sum(LENGTHS) - 6) < 0.65
    assert copy["ids"].dtype == np.int64
    assert copy["ids"].max() < 1000
    again = list(with_random_tokens([feed(0)], "ids", 1000, 0.3, seed=0))[1][0]
    np.testing.assert_array_equal(again["ids"], copy["ids"])
