"""Streams of feeds without end."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from onnx import TensorProto, helper
from pruning.distil.small_models import build

from iobs_onnx.errors import DataError
from iobs_onnx.pruning.distil import endless, mirrored, varied, written
from iobs_onnx.runtime import input_specs, open_session


def test_samples_are_dealt_anew_each_epoch_and_none_is_lost() -> None:
    feeds = [{"x": np.arange(i, i + 4.0)[:, None]} for i in (0, 4, 8)]
    stream = endless(feeds, seed=3)
    first, second = list(islice(stream, 3)), list(islice(stream, 3))
    for epoch in (first, second):
        seen = np.concatenate([feed["x"] for feed in epoch])[:, 0]
        assert sorted(seen) == list(range(12))
    assert not np.array_equal(first[0]["x"], second[0]["x"])
    again = list(islice(endless(feeds, seed=3), 3))
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(first, again, strict=True))


def test_feeds_of_several_lengths_stay_whole() -> None:
    feeds = [{"x": np.full((2, length), length)} for length in (3, 5, 7)]
    lengths = [feed["x"].shape[1] for feed in islice(endless(feeds), 9)]
    assert sorted(lengths[:3]) == sorted(lengths[3:6]) == sorted(lengths[6:]) == [3, 5, 7]
    with pytest.raises(DataError, match="no feeds to train on"):
        next(endless([]))


def test_images_are_mirrored_each_by_chance_and_other_inputs_not() -> None:
    image = np.arange(6, dtype=np.float32).reshape(1, 1, 1, 6)
    feeds = [{"x": image.repeat(16, 0), "size": np.ones((16, 2), np.float32)}]
    (feed,) = mirrored(feeds)
    flipped = [np.array_equal(row, image[0, ..., ::-1]) for row in feed["x"]]
    assert 0 < sum(flipped) < 16
    assert feed["x"].dtype == np.float32
    assert np.array_equal(feed["size"], feeds[0]["size"])


def test_a_language_model_goes_on_writing() -> None:
    random = np.random.default_rng(0)
    model = build(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["e"]),
            helper.make_node("MatMul", ["e", "head"], ["logits"]),
        ],
        {
            "table": random.normal(size=(30, 8)).astype(np.float32),
            "head": random.normal(size=(8, 30)).astype(np.float32),
        },
        {"input_ids": (TensorProto.INT64, ["n", "l"])},
        {"logits": (TensorProto.FLOAT, ["n", "l", 30])},
    )

    def stream() -> list[np.ndarray]:
        texts = written(
            open_session(model, "cpu"),
            input_specs(model),
            30,
            length=6,
            start=1,
            batch=2,
            chunk=4,
            reuse=2,
        )
        return [feed["input_ids"] for feed in islice(texts, 10)]

    found = stream()
    assert all(ids.shape == (2, 6) and (ids[:, 0] == 1).all() for ids in found)
    # Two fresh feeds, then two that are made of those, and so on.
    seen = set(np.concatenate(found[:2])[:, 1:].ravel()) | {1}
    assert all(set(ids.ravel()) <= seen for ids in found[2:4])
    assert [ids.tobytes() for ids in stream()] == [ids.tobytes() for ids in found]


def test_texts_read_again_are_cut_joined_and_changed_but_begin_as_they_did() -> None:
    ids = np.arange(64 * 20).reshape(64, 20) + 1000
    ids[:, 0] = 1
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    found = varied(feed, np.array([7, 8]), np.random.default_rng(0))
    rows = found["input_ids"]
    assert rows.shape == ids.shape
    assert (rows[:, 0] == 1).all()
    assert np.array_equal(found["attention_mask"], feed["attention_mask"])
    same = (rows == ids).all(1)
    replaced = np.isin(rows, [7, 8]).any(1)
    assert 5 < same.sum() < 30
    assert 15 < replaced.sum() < 45
    joined = (rows[:, 1:] == 1).any(1)
    assert 10 < joined.sum() < 45
    assert np.array_equal(feed["input_ids"][:, 1], ids[:, 1])


def test_given_texts_are_read_as_they_are_once_and_padded_ones_always() -> None:
    ids = np.arange(16 * 9).reshape(16, 9)
    whole = [{"input_ids": ids[at : at + 4]} for at in range(0, 16, 4)]
    stream = endless(whole, vary=True)
    first, second = (np.concatenate([next(stream)["input_ids"] for _ in whole]) for _ in range(2))
    assert {row.tobytes() for row in first} == {row.tobytes() for row in ids}
    known = {row.tobytes() for row in ids}
    assert 0 < sum(row.tobytes() not in known for row in second) < 16
    assert set(second.ravel()) <= set(ids.ravel())
    mask = np.ones_like(ids[:4])
    mask[0, -1] = 0
    padded = endless([{"input_ids": ids[:4], "attention_mask": mask}], vary=True)
    for feed in islice(padded, 4):
        assert np.array_equal(feed["input_ids"], ids[:4])
