"""Which activations the padding mask is for, where shapes alone would mislead."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import iobs_onnx
from iobs_onnx.passes import find_sites, load_model, prepare
from iobs_onnx.runtime.padding import Padding

WIDTH = 8
IDS, FLOAT = TensorProto.INT64, TensorProto.FLOAT


def model(kind: str, names: tuple[str, str] = ("source", "target")) -> onnx.ModelProto:
    """Attention over `input_ids`; with `kind` the queries come from a decoder, or the layout turns.

    `names` are those of the encoder's and the decoder's lengths.
    """
    draw = np.random.default_rng(0)
    node, source = helper.make_node, ["batch", names[0]]
    nodes = [
        node("Gather", ["table", "input_ids"], ["rows"]),
        node("MatMul", ["rows", "key"], ["keys"], name="key"),
        node("Transpose", ["keys"], ["turned"], perm=[0, 2, 1]),
        node("Cast", ["attention_mask"], ["mask"], to=FLOAT),
        node("Sub", ["mask", "one"], ["off"]),
        node("Mul", ["off", "big"], ["low"]),
        node("Unsqueeze", ["low", "first"], ["bias"]),
    ]
    inputs = {"input_ids": (IDS, source), "attention_mask": (IDS, source)}
    asking = "rows"
    if kind == "decoder":
        inputs["decoder_input_ids"] = (IDS, ["batch", names[1]])
        nodes.append(node("Gather", ["table", "decoder_input_ids"], ["asking"]))
        asking = "asking"
    nodes += [
        node("MatMul", [asking, "query"], ["queries"], name="query"),
        node("MatMul", ["queries", "turned"], ["scores"]),
        node("Add", ["scores", "bias"], ["masked"]),
        node("Softmax", ["masked"], ["share"], axis=-1),
        node("MatMul", ["share", "rows"], ["context"]),
    ]
    last = "context"
    if kind == "turned":  # time first: with as many sentences as positions the shape is the same
        nodes.append(node("Transpose", ["context"], ["time_first"], perm=[1, 0, 2]))
        last = "time_first"
    elif kind == "heads":  # with as many heads as positions, likewise
        nodes.append(node("Reshape", ["context", "cut"], ["cut_up"]))
        nodes.append(node("Transpose", ["cut_up"], ["by_head"], perm=[0, 2, 1, 3]))
        last = "by_head"
    nodes.append(node("MatMul", [last, "out"], ["y"], name="out"))
    width = 2 if kind == "heads" else WIDTH
    tensors = {
        "table": draw.normal(size=(50, WIDTH)).astype(np.float32),
        "one": np.array(1, np.float32),
        "big": np.array(1e9, np.float32),
        "first": np.array([1]),
        "cut": np.array([0, 0, 4, 2]),
        **{n: draw.normal(size=(WIDTH, WIDTH)).astype(np.float32) for n in ("key", "query")},
        "out": draw.normal(size=(width, WIDTH)).astype(np.float32),
    }
    read = {name for each in nodes for name in each.input}
    graph = helper.make_graph(
        nodes,
        kind,
        [helper.make_tensor_value_info(name, *what) for name, what in inputs.items()],
        [helper.make_tensor_value_info("y", FLOAT, [None] * (4 if kind == "heads" else 3))],
        [numpy_helper.from_array(a, name) for name, a in tensors.items() if name in read],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    return made


def feeds(sentences: int, length: int, *more: str) -> list[dict[str, np.ndarray]]:
    """Three feeds; in the last a sentence is cut short."""
    draw = np.random.default_rng(1)
    made = []
    for number in range(3):
        names = ("input_ids", *more)
        feed = {name: draw.integers(1, 50, (sentences, length)) for name in names}
        feed["attention_mask"] = np.ones((sentences, length), np.int64)
        feed["attention_mask"][0, 1:] = number < 2
        made.append(feed)
    return made


def rows(made: onnx.ModelProto, data: list[dict[str, np.ndarray]]) -> tuple[dict[str, int], list]:
    report = iobs_onnx.prune(
        made,
        calibration=data,
        holdout=data[:1],
        sparsity="50%",
        solver="magnitude",
        random_tokens=0.0,
    ).report
    return {s.name: s.rows for s in report.sites}, report.calibration.padding_kept


@pytest.mark.parametrize("names", [("source", "target"), ("length", "length"), ("", "")])
def test_an_encoder_s_mask_drops_no_row_of_the_decoder(names: tuple[str, str]) -> None:
    """Where both are equally long, whatever the exporter calls the lengths."""
    made = model("decoder", names)
    found, kept = rows(made, feeds(4, 5, "decoder_input_ids"))
    assert found["query"] == 3 * 4 * 5
    assert found["key"] == found["query"] - 4
    assert any("asking" in name for name in kept)
    assert not any(name.startswith("rows") for name in kept)


@pytest.mark.parametrize(("kind", "sentences"), [("turned", 5), ("heads", 3)])
def test_axes_of_other_things_that_are_as_long_are_left_alone(kind: str, sentences: int) -> None:
    """A batch of as many sentences as positions, time first; as many heads as positions."""
    length = 5 if kind == "turned" else 4
    found, kept = rows(model(kind), feeds(sentences, length))
    positions = 3 * sentences * length
    assert found["key"] == found["query"] == positions - (length - 1)
    assert found["out"] == positions * (1 if kind == "turned" else 4)
    assert len(kept) == 1


def test_an_exported_encoder_decoder(tmp_path: Path) -> None:
    """BART by TorchScript, both lengths under one name."""
    import torch
    from transformers import BartConfig, BartModel

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=100,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        attn_implementation="eager",
        use_cache=False,
    )

    class Last(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = BartModel(config).eval()

        def forward(self, ids, mask, targets):
            return self.model(ids, mask, decoder_input_ids=targets).last_hidden_state

    ids = torch.randint(3, 90, (2, 9))
    names = ["input_ids", "attention_mask", "decoder_input_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Last(),
            (ids, torch.ones_like(ids), ids[:, :7]),
            tmp_path / "bart.onnx",
            dynamo=False,
            opset_version=17,
            input_names=names,
            dynamic_axes={name: {0: "batch", 1: "length"} for name in names},
        )
    bart = load_model(tmp_path / "bart.onnx")
    sites = find_sites(bart).sites
    padding = Padding(prepare(bart, sites))
    mask = np.arange(18).reshape(2, 9) % 9 < 6
    found: dict[str, set[bool]] = {"encoder": set(), "decoder": set()}
    for value in {tap.value for site in sites for tap in site.taps}:
        (part,) = {"encoder", "decoder"}.intersection(value.split("/"))
        found[part].add(padding.over(mask, value, (2, 9, 32)) is not None)
    assert found == {"encoder": {True}, "decoder": {False}}
