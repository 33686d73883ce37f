"""Whole models, against ONNX Runtime on real inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from iobs_onnx.passes import load_model
from iobs_onnx.runtime.differentiable import Evaluator, agreement, unsupported


def test_magika(magika_model):
    model = ir.load(magika_model)
    assert unsupported(model) == []
    bytes_ = np.random.default_rng(0).integers(0, 257, (4, 2048)).astype(np.int32)
    found = agreement(model, [{"bytes": bytes_}], tolerance=1e-5)
    assert found.ok, found.reason


def test_minilm_and_the_gradients_of_all_its_weights(minilm_model, minilm_feeds):
    model = ir.load(minilm_model)
    found = agreement(model, minilm_feeds[:2], tolerance=1e-5)
    assert found.ok, found.reason
    evaluator = Evaluator(model)
    weights = {
        name: evaluator.weight(name).clone().requires_grad_()
        for name, value in model.graph.initializers.items()
        if value.dtype == ir.DataType.FLOAT and value.const_value.size > 1
    }
    feed = {name: torch.from_numpy(array[:2]) for name, array in minilm_feeds[0].items()}
    y = evaluator(feed, weights)["last_hidden_state"]
    torch.testing.assert_close(
        y.detach(), evaluator(feed)["last_hidden_state"], rtol=1e-4, atol=1e-4
    )
    y.square().sum().backward()
    assert len(weights) > 90
    idle = [name for name, weight in weights.items() if weight.grad is None]
    assert idle == []
    # A step along the gradient changes the loss by what it says.
    name = next(name for name, weight in weights.items() if weight.shape == (384, 1536))
    step = {name: weights[name].detach() - 1e-7 * weights[name].grad}
    with torch.no_grad():
        before = y.double().square().sum()
        after = evaluator(feed, step)["last_hidden_state"].double().square().sum()
    expected = -1e-7 * weights[name].grad.square().sum()
    assert float(after - before) == pytest.approx(float(expected), rel=0.1)


@pytest.mark.parametrize("name", ["resnet20", "resnet56", "stories15M"])
def test_models_beside_the_checkout(name, shared):
    model = ir.load(shared / "models" / f"{name}.onnx")
    rng = np.random.default_rng(0)
    if name.startswith("resnet"):
        feeds = [{"x": rng.standard_normal((4, 3, 32, 32)).astype(np.float32)}]
    else:
        feeds = [{"input_ids": rng.integers(0, 32000, (2, 40))}]
    found = agreement(model, feeds, tolerance=1e-5)
    assert found.ok, found.reason


def test_a_four_bit_file_of_genai_agrees():
    """Its embedding is GatherBlockQuantized, its products MatMulNBits."""
    path = Path(__file__).parents[2] / "data/genai-int4/model.onnx"
    ids = np.random.default_rng(0).integers(0, 200, (2, 9))
    past = {
        f"past_key_values.0.{what}": np.zeros((2, 1, 0, 16), np.float32)
        for what in ("key", "value")
    }
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), **past}
    found = agreement(load_model(path), [feed], tolerance=1e-4)
    assert found.ok, found.reason
    assert {difference.name for difference in found.differences} >= {"logits"}
