import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from iobs_onnx.engine import Engine
from iobs_onnx.engine import compare as compare_in_place
from iobs_onnx.errors import DataError, ModelError
from iobs_onnx.passes import load_model
from iobs_onnx.runtime import Batch, OutputFidelity
from iobs_onnx.runtime.fidelity import Fidelity


def compare(dense, sparse, feeds):
    engine = Engine("cpu", 1 << 30, Path())
    return compare_in_place(load_model(dense), load_model(sparse), feeds, engine)


def finite(model, feeds):
    return {output.name: output.finite for output in compare(model, model, feeds)}


IDS = (TensorProto.INT64, ["b", "s"])


@pytest.fixture
def pair(build):
    """Return a function giving a model `y = table[ids]`, a pooled and an integer output."""

    def make(table):
        return build(
            [
                helper.make_node("Gather", ["table", "input_ids"], ["y"]),
                helper.make_node("ReduceMean", ["y"], ["pooled"], axes=[1], keepdims=0),
                helper.make_node("Identity", ["input_ids"], ["count"]),
            ],
            {"input_ids": IDS, "attention_mask": IDS},
            {
                "y": (TensorProto.FLOAT, ["b", "s", table.shape[1]]),
                "pooled": (TensorProto.FLOAT, ["b", table.shape[1]]),
                "count": IDS,
            },
            {"table": table.astype(np.float32)},
        )

    return make


def feed(ids, mask=None):
    ids = np.array(ids)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids) if mask is None else mask}


def test_error_and_cosine_over_all_feeds(pair):
    rng = np.random.default_rng(0)
    dense, sparse = rng.standard_normal((2, 9, 5)).astype(np.float32)
    feeds = [feed(rng.integers(0, 9, (2, 3))), feed(rng.integers(0, 9, (4, 7)))]
    y, pooled = compare(pair(dense), pair(sparse), iter(feeds))
    ids = np.concatenate([one["input_ids"].ravel() for one in feeds])
    a, b = dense[ids].astype(np.float64), sparse[ids].astype(np.float64)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert (y.name, pooled.name) == ("y", "pooled")
    assert y.relative_error == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-6)
    assert y.cosine == pytest.approx(cosines.mean(), rel=1e-6)
    assert y.finite
    assert pooled.relative_error > 0


def test_a_model_equals_itself(pair):
    model = pair(np.eye(4))
    for result in compare(model, model, [feed([[0, 1], [2, 3]])]):
        assert result == OutputFidelity(result.name, 0.0, pytest.approx(1.0), True, feeds=1)


def test_padding_is_left_out_of_sequences(pair):
    dense = np.array([[1.0, 0.0], [3.0, 4.0]])
    sparse = np.array([[1.0, 0.0], [9.0, -7.0]])
    one = feed([[0, 1]], np.array([[1, 0]]))
    y, pooled = compare(pair(dense), pair(sparse), [one])
    assert (y.relative_error, y.cosine) == (0.0, 1.0)
    assert pooled.relative_error > 0


def test_zero_vectors(pair):
    zero, one = np.zeros((1, 2)), np.ones((1, 2))
    ids = [feed([[0]])]
    y, _ = compare(pair(zero), pair(zero), ids)
    assert (y.relative_error, y.cosine) == (0.0, 1.0)
    y, _ = compare(pair(one), pair(zero), ids)
    assert (y.relative_error, y.cosine) == (1.0, 0.0)
    y, _ = compare(pair(zero), pair(one), ids)
    assert (y.relative_error, y.cosine) == (math.inf, 0.0)


def test_what_is_not_finite(pair):
    broken = np.array([[1.0, 1.0], [np.nan, 1.0]])
    y, _ = compare(pair(np.ones((2, 2))), pair(broken), [feed([[0]]), feed([[1]])])
    assert not y.finite
    assert finite(pair(broken), [feed([[0]]), feed([[1]])]) == {
        "y": False,
        "pooled": False,
    }
    assert finite(pair(broken), [feed([[0]])]) == {"y": True, "pooled": True}
    masked = feed([[0, 1]], np.array([[1, 0]]))
    assert finite(pair(broken), [masked]) == {"y": True, "pooled": False}


def test_float16_and_scalar_outputs(build):
    kind = (TensorProto.FLOAT16, ["n"])
    model = build(
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)],
        {"x": kind},
        {"y": (TensorProto.FLOAT16, [])},
    )
    (y,) = compare(model, model, [{"x": np.full(7, 100, np.float16)}])
    assert y == OutputFidelity("y", 0.0, 1.0, True, feeds=1)


def test_no_feeds(pair):
    model = pair(np.eye(2))
    with pytest.raises(DataError, match="there are no feeds to run the model on"):
        compare(model, model, [])
    with pytest.raises(DataError, match="there are no feeds to run the model on"):
        finite(model, [])


def test_outputs_that_do_not_correspond(pair):
    dense, sparse = pair(np.eye(2)), pair(np.eye(2))
    sparse.graph.output[0].name = "z"
    sparse.graph.node[0].output[0] = sparse.graph.node[1].input[0] = "z"
    with pytest.raises(ModelError, match="activation 'y': the main graph has no such value"):
        compare(dense, sparse, [feed([[0]])])
    with pytest.raises(ModelError, match=r"'y' has shape .*2\] in the dense model, .*3\] in the"):
        compare(dense, pair(np.eye(3)), [feed([[0]])])


def test_a_feed_that_cannot_run(pair):
    with pytest.raises(ModelError, match="ONNX Runtime cannot run the model on this feed"):
        finite(pair(np.eye(2)), [feed([[5]])])


def test_models_may_be_paths(pair, tmp_path):
    model = pair(np.eye(2))
    onnx.save(model, tmp_path / "m.onnx")
    assert numpy_helper.to_array(model.graph.initializer[0]).shape == (2, 2)
    y, _ = compare(tmp_path / "m.onnx", model, [feed([[0]])])
    assert y.relative_error == 0.0


def test_feeds_on_which_the_shapes_differ_are_left_out_and_told():
    drawn = np.random.default_rng(0)
    lengths = [(4, 4), (5, 3), (6, 6), (2, 3)]
    pairs = [[drawn.normal(size=(n, 3)).astype("f") for n in both] for both in lengths]
    found = Fidelity()
    for dense, sparse in pairs:
        same = torch.from_numpy(dense)
        found.add(*(Batch({"y": torch.from_numpy(y), "same": same}) for y in (dense, sparse)))
    y, same = found.result()
    a, b = (np.concatenate([pairs[i][k] for i in (0, 2)]).astype(np.float64) for k in (0, 1))
    error = np.linalg.norm(b - a) / np.linalg.norm(a)
    assert y.relative_error == pytest.approx(error, rel=1e-6)
    assert (y.feeds, y.apart, y.finite) == (4, 2, True)
    assert y.note.startswith("compared on 2 of 4 feeds")
    assert "(5, 3) and (3, 3)" in y.note
    # A feed that is left out counts as an error of 1, and no model gains by leaving feeds out.
    assert y.counted == pytest.approx(np.sqrt((2 * 1 + 2 * error**2) / 4), rel=1e-6)
    assert (same.relative_error, same.counted, same.note) == (0.0, 0.0, None)


def test_an_output_whose_shapes_never_agree_is_not_compared_but_must_be_finite():
    found = Fidelity()
    found.add(Batch({"y": torch.zeros(2)}), Batch({"y": torch.tensor([0.0, 1.0, torch.nan])}))
    (y,) = found.result()
    assert (y.relative_error, y.cosine, y.counted, y.finite) == (None, None, 1.0, False)
    assert y.note.startswith("not compared")
