"""Which loss an output gets, and what the losses are."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from pruning.distil.small_models import build, encoder, linear

from iobs_onnx.errors import ModelError
from iobs_onnx.pruning.distil.losses import Target, distance, find_targets, predicts_tokens


def ended(*ends: str, output: str = "y", axis: int | None = None) -> ir.Model:
    """A Gemm with nodes behind it."""
    names = ["z", *(f"e{i}" for i in range(len(ends)))]
    names[-1] = output
    nodes = [helper.make_node("Gemm", ["x", "w"], [names[0]])]
    for op, before, after in zip(ends, names, names[1:], strict=False):
        extra = {} if axis is None or op not in ("Softmax", "LogSoftmax") else {"axis": axis}
        nodes.append(helper.make_node(op, [before], [after], **extra))
    return build(
        nodes,
        {"w": np.eye(8, dtype=np.float32)},
        {"x": (TensorProto.FLOAT, ["n", 8])},
        {output: (TensorProto.FLOAT, ["n", 8])},
    )


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (ended(), Target("y", "y", "kl")),
        (ended("Softmax", axis=-1), Target("y", "z", "kl", -1)),
        (ended("Relu", "LogSoftmax", axis=1), Target("y", "e0", "kl", 1)),
        (ended("Sigmoid"), Target("y", "y", "mse")),
        (ended("Tanh", output="start_logits"), Target("start_logits", "start_logits", "kl")),
        (ended(output="image_embeds"), Target("image_embeds", "image_embeds", "embedding")),
        (linear(np.eye(8)), Target("y", "y", "kl")),
        (
            encoder(prune=False)[0],
            Target("last_hidden_state", "last_hidden_state", "embedding"),
        ),
    ],
)
def test_an_output_decides_its_loss(model: ir.Model, expected: Target) -> None:
    assert find_targets(model) == [expected]


def test_a_last_axis_of_the_vocabulary_is_one_of_logits() -> None:
    model = build(
        [
            helper.make_node("Gather", ["table", "ids"], ["e"]),
            helper.make_node("Transpose", ["table"], ["head"]),
            helper.make_node("MatMul", ["e", "head"], ["out"]),
        ],
        {"table": np.ones((50, 8), np.float32)},
        {"ids": (TensorProto.INT64, ["n", "l"])},
        {"out": (TensorProto.FLOAT, ["n", "l", 50])},
    )
    assert find_targets(model) == [Target("out", "out", "kl")]
    assert find_targets(model, "mse") == [Target("out", "out", "mse")]
    assert predicts_tokens(model)
    assert not predicts_tokens(encoder(prune=False)[0])
    assert not predicts_tokens(linear(np.eye(8)))


def test_caches_are_not_matched_and_something_must_be() -> None:
    model = ended(output="present.0.key")
    with pytest.raises(ModelError, match="no float output besides caches"):
        find_targets(model)


def test_kl_is_that_of_torch_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    dense, sparse = torch.randn(2, 5, 7), torch.randn(2, 5, 7, requires_grad=True)
    target = [Target("y", "y", "kl")]
    found = distance(target, {"y": dense}, {"y": sparse}, None)
    (ours,) = torch.autograd.grad(found.loss, sparse)
    expected = torch.nn.functional.kl_div(
        sparse.log_softmax(-1).reshape(-1, 7),
        dense.log_softmax(-1).reshape(-1, 7),
        reduction="batchmean",
        log_target=True,
    )
    (theirs,) = torch.autograd.grad(expected, sparse)
    assert found.rows == 10
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(ours, theirs)


def test_padding_is_left_out_of_every_kind() -> None:
    torch.manual_seed(0)
    mask = torch.ones(3, 5, dtype=torch.int64)
    mask[0, 2:] = 0
    dense, sparse = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    for kind in ("kl", "mse", "embedding"):
        target = [Target("y", "y", kind)]  # type: ignore[arg-type]
        before = distance(target, {"y": dense}, {"y": sparse}, mask)
        changed = torch.where(mask[..., None] != 0, sparse, 100.0)
        after = distance(target, {"y": dense}, {"y": changed}, mask)
        assert before.rows == after.rows == 12
        assert before.loss == after.loss


def test_identical_outputs_are_no_distance_apart_and_shapes_must_fit() -> None:
    torch.manual_seed(0)
    y = torch.randn(3, 5, 7)
    for kind in ("kl", "mse", "embedding"):
        target = [Target("y", "y", kind)]  # type: ignore[arg-type]
        assert distance(target, {"y": y}, {"y": y}, None).loss == 0
        with pytest.raises(ModelError, match="has shape"):
            distance(target, {"y": y}, {"y": y[1:]}, None)
