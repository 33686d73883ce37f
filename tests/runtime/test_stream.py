"""What streams hold between segments: in memory, on disk, and over one another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from iobs_onnx.errors import ModelError
from iobs_onnx.passes import instrument
from iobs_onnx.runtime import Padding, Store, Stream, open_session

F = TensorProto.FLOAT


@pytest.fixture
def model(build):
    """`a = |x|`, `b = a + m`, `y = b * a`."""
    kind = (F, ["n", 3])
    nodes = [
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("Add", ["a", "m"], ["b"]),
        helper.make_node("Mul", ["b", "a"], ["y"]),
    ]
    return ir.from_proto(build(nodes, {"x": kind, "m": kind}, {"y": kind}))


def feeds(count=4):
    rng = np.random.default_rng(0)
    return [
        {name: rng.standard_normal((2 + i, 3)).astype(np.float32) for name in "xm"}
        for i in range(count)
    ]


def part(model, values, stream, given=()):
    return open_session(instrument(model, values, stream.kinds(given)), "cpu")


def fetched(batches, name):
    return [batch.values[name].numpy().copy() for batch in batches]


@pytest.mark.parametrize("budget", [0, 100, 1 << 20])
def test_two_segments_equal_the_whole(model, tmp_path, budget):
    stream = Stream(iter(feeds()), Store(tmp_path, budget))
    first = part(model, ["a"], stream)
    for _ in stream.run(first, keep=["a"], alive=["a", "m"]):
        pass
    assert len(stream) == 4
    assert stream.kinds(["a", "m", "x"]) == {"a": (F, 2), "m": (F, 2)}
    assert bool(list(tmp_path.iterdir())) == (budget < 300)
    second = part(model, ["y", "b"], stream, ["a", "m"])
    found = fetched(stream.run(second, fetch=["y"], keep=["b"], alive=["b"]), "y")
    for feed, y in zip(feeds(), found, strict=True):
        a = np.abs(feed["x"])
        np.testing.assert_array_equal(y, (a + feed["m"]) * a)
    # A value that was computed before needs no session.
    b = fetched(stream.run(None, fetch=["b"]), "b")
    np.testing.assert_array_equal(b[3], np.abs(feeds()[3]["x"]) + feeds()[3]["m"])
    assert list(tmp_path.iterdir()) == []


def test_a_stream_over_another_holds_only_what_differs(model, tmp_path):
    base = Stream(iter(feeds()), Store(tmp_path, 1 << 20))
    for _ in base.run(part(model, ["a"], base), keep=["a"], alive=["a", "m"]):
        pass
    over = base.over()
    assert len(over) == 4
    assert not over.holds(["a", "m"])
    session = part(model, ["b"], over, ["a", "m"])
    for _ in over.run(session, keep=["b"], alive=["b"]):
        pass
    assert over.holds(["b"])
    assert not base.holds(["b"])
    b = fetched(over.run(None, fetch=["b"], alive=["b"]), "b")
    np.testing.assert_array_equal(b[0], np.abs(feeds()[0]["x"]) + feeds()[0]["m"])
    np.testing.assert_array_equal(
        fetched(over.run(None, fetch=["a"]), "a")[1], np.abs(feeds()[1]["x"])
    )


def test_both_streams_can_run_in_step_while_the_feeds_are_read(model, tmp_path):
    base = Stream(iter(feeds()), Store(tmp_path, 1 << 20))
    over = base.over()
    session = part(model, ["y"], base)
    pairs = zip(base.run(session, fetch=["y"]), over.run(session, fetch=["y"]), strict=True)
    seen = [np.array_equal(a.values["y"], b.values["y"]) for a, b in pairs]
    assert seen == [True] * 4


def test_a_value_that_is_gone(model, tmp_path):
    stream = Stream(iter(feeds()), Store(tmp_path, 1 << 20))
    for _ in stream.run(part(model, ["a"], stream), keep=["a"], alive=["a"]):
        pass
    kinds = {"a": (F, 2), "m": (F, 2)}
    session = open_session(instrument(model, ["b"], kinds), "cpu")
    with pytest.raises(ModelError, match="value 'm' is needed, and neither fed nor computed"):
        list(stream.run(session, fetch=["b"]))


def test_masks_go_with_their_batches(model):
    rows = [np.array([[1, 1], [1, 0]]), np.array([[1, 1]])]
    given = [{**feed, "attention_mask": mask} for feed, mask in zip(feeds(2), rows, strict=True)]
    stream = Stream(iter(given), Store(Path(), 1 << 20), padding=Padding(model))
    masks = [batch.mask for batch in stream.run(part(model, ["y"], stream), fetch=["y"])]
    np.testing.assert_array_equal(masks[0], rows[0] == 1)
    again = [batch.mask for batch in stream.over().run(None)]
    np.testing.assert_array_equal(again[1], rows[1] == 1)
