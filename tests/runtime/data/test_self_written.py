"""Text that a language model writes itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import iobs_onnx
from iobs_onnx.errors import DataError, OptionError
from iobs_onnx.passes import load_model
from iobs_onnx.runtime import SelfSamples, input_specs, open_session

TOKENS, WIDTH = 6, 4
RNG = np.random.default_rng(3)
ARRAYS = {
    "table": RNG.normal(size=(TOKENS, WIDTH)).astype(np.float32),
    "head": RNG.normal(size=(WIDTH, TOKENS)).astype(np.float32),
}
IDS = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])


def build(
    nodes: list[onnx.NodeProto], more: list[onnx.ValueInfoProto], **arrays
) -> onnx.ModelProto:
    """Return a model of logits, with what `more` lists as inputs or, named present, as outputs."""
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", TOKENS])
    graph = helper.make_graph(
        nodes,
        "writer",
        [IDS, *(value for value in more if "past" in value.name)],
        [logits, *(value for value in more if "present" in value.name)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in {**ARRAYS, **arrays}.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def bigram() -> onnx.ModelProto:
    """The next token depends on the last alone."""
    return build(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["x"]),
            helper.make_node("MatMul", ["x", "head"], ["logits"]),
        ],
        [],
    )


def sums(cached: bool) -> onnx.ModelProto:
    """The next token depends on the sum over all tokens so far, whose vectors may be cached."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Unsqueeze", ["x", "one"], ["key"]),
        helper.make_node("Shape", ["input_ids"], ["length"], start=1, end=2),
        helper.make_node("Neg", ["length"], ["first"]),
        helper.make_node("CumSum", ["present.0.key", "two"], ["all"]),
        helper.make_node("Slice", ["all", "first", "end", "two"], ["new"]),
        helper.make_node("Squeeze", ["new", "one"], ["state"]),
        helper.make_node("MatMul", ["state", "head"], ["logits"]),
    ]
    shape = ["b", 1, "n", WIDTH]
    names = ["past_key_values.0.key", "present.0.key"] if cached else []
    if cached:
        nodes.insert(2, helper.make_node("Concat", [names[0], "key"], [names[1]], axis=2))
    else:
        nodes.insert(2, helper.make_node("Identity", ["key"], ["present.0.key"]))
    more = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]
    return build(nodes, more, one=[1], two=np.array([2]), end=[2**31])


def samples(model: onnx.ModelProto | Path, tokens: int = TOKENS, **how) -> SelfSamples:
    loaded = load_model(model)
    return SelfSamples(open_session(loaded, "cpu"), input_specs(loaded), tokens, **how)


def test_tokens_follow_the_model_s_distribution() -> None:
    rows = samples(bigram(), count=400, length=64, start=2).feed(range(400))["input_ids"]
    assert rows.shape == (400, 64)
    assert (rows[:, 0] == 2).all()
    logits = (ARRAYS["table"] @ ARRAYS["head"]).astype(float)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    counts = np.zeros((TOKENS, TOKENS))
    np.add.at(counts, (rows[:, :-1].ravel(), rows[:, 1:].ravel()), 1)
    seen = counts.sum(1, keepdims=True)
    # Four standard deviations of a binomial share, for each of 36.
    slack = 4 * np.sqrt(expected * (1 - expected) / seen)
    assert (np.abs(counts / seen - expected) < slack).all()


def test_a_cache_changes_the_time_and_not_the_text() -> None:
    whole = samples(sums(cached=False), length=24, seed=5).feed(range(8))
    cached = samples(sums(cached=True), length=24, seed=5)
    feed = cached.feed(range(8))
    assert np.array_equal(feed["input_ids"], whole["input_ids"])
    assert feed["past_key_values.0.key"].shape == (8, 1, 0, WIDTH)
    assert len(set(feed["input_ids"][:, 0])) > 1  # without a start token each draws its own
    assert np.array_equal(cached.feed([3, 1])["input_ids"], feed["input_ids"][[3, 1]])
    other = samples(sums(cached=True), length=24, seed=6).feed(range(8))
    assert not np.array_equal(other["input_ids"], feed["input_ids"])


def test_models_that_cannot_write_are_refused() -> None:
    backwards = build(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["x"]),
            helper.make_node("CumSum", ["x", "one"], ["all"], reverse=1),
            helper.make_node("MatMul", ["all", "head"], ["logits"]),
        ],
        [],
        one=np.array(1),
    )
    with pytest.raises(DataError, match="'logits' changes where a later token does"):
        samples(backwards)
    with pytest.raises(DataError, match="no output is a number for each of 5 tokens"):
        samples(bigram(), tokens=5)
    spoilt = bigram()
    table = ARRAYS["table"].copy()
    table[2] = np.nan
    spoilt.graph.initializer[0].CopyFrom(numpy_helper.from_array(table, "table"))
    with pytest.raises(DataError, match="logits hold NaN or Inf"):
        samples(spoilt, start=2).feed([0])
    with pytest.raises(OptionError, match="start_token 6: the model has tokens 0 to 5"):
        samples(bigram(), start=6)


def test_a_language_model_is_pruned_on_its_own_text(shared: Path, tmp_path: Path) -> None:
    model = shared / "models" / "stories15M.onnx"
    result = iobs_onnx.prune(
        model,
        calibration="self",
        start_token=1,
        samples=8,
        sequence_length=24,
        sparsity="2:4",
        solver="magnitude",
        output=tmp_path / "sparse.onnx",
    )
    record = result.report.calibration
    assert (record.source, record.samples) == ("text that the model wrote", 8)
    ids = samples(model, 32000, count=8, length=24, start=1).feed(range(8))["input_ids"]
    (logits,) = open_session(model, "cpu").run(["logits"], {"input_ids": ids})
    logits = logits[:, :-1] - logits[:, :-1].max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
    # Its own text is likely (mean surprise below 3 nats); random tokens cost about ln 32000 = 10.
    assert float((np.log(np.exp(logits).sum(-1)) - chosen).mean()) < 3
