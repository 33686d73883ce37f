"""Files that users hold, through the commands that the documentation names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from iobs_onnx.cli import main
from iobs_onnx.passes import find_positions, load_model
from iobs_onnx.runtime import input_specs


def test_a_batch_axis_of_minus_one_is_dynamic(paddle_model: Path, tmp_path: Path) -> None:
    """Paddle2ONNX writes -1 where others write a name."""
    batch = onnx.load(paddle_model).graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_value == -1
    assert input_specs(load_model(paddle_model))[0].shape == (None, 3, None, None)
    draw = np.random.default_rng(0)
    images = draw.normal(size=(6, 3, 48, 96)).astype(np.float32)
    np.savez(tmp_path / "images.npz", x=images)
    (tmp_path / "feeds").mkdir()
    for i in range(3):
        np.savez(tmp_path / "feeds" / f"{i}.npz", x=images[2 * i : 2 * i + 2])
    for number, data in enumerate(("images.npz", "feeds")):
        out = tmp_path / f"{number}.onnx"
        command = ["prune", str(paddle_model), "--calibration", str(tmp_path / data), "--quiet"]
        command += ["--sparsity", "2:4", "--preset", "fast", "--sequential", "segment"]
        assert main([*command, "--output", str(out), "--report-dir", str(tmp_path)]) == 0
        assert json.loads((tmp_path / "report.json").read_text())["totals"]["sites"] == 35
        check = ["verify", str(out), "--dense", str(paddle_model), "--data", str(tmp_path / data)]
        assert main(check) == 0


def bert(folder: Path) -> Path:
    """Lookups of 30,522 tokens and of 40 positions, counted from 0, and a linear behind them."""
    node = helper.make_node
    nodes = [
        node("Shape", ["input_ids"], ["shape"]),
        node("Gather", ["shape", "one"], ["length"]),
        node("Range", ["zero", "length", "one"], ["places"]),
        node("Gather", ["words", "input_ids"], ["word"]),
        node("Gather", ["positions", "places"], ["place"]),
        node("Add", ["word", "place"], ["x"]),
        node("MatMul", ["x", "w"], ["y"]),
    ]
    draw = np.random.default_rng(0)
    tensors = {
        "one": np.array(1),
        "zero": np.array(0),
        "words": draw.normal(size=(30522, 8)).astype(np.float32),
        "positions": draw.normal(size=(40, 8)).astype(np.float32),
        "w": draw.normal(size=(8, 8)).astype(np.float32),
    }
    ids = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["b", "s"])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["b", "s", 8])
    weights = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "bert", [ids], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "bert.onnx")
    return folder / "bert.onnx"


def test_text_for_a_model_with_few_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import minilm

    model, out = bert(tmp_path), tmp_path / "out.onnx"
    assert find_positions(load_model(model)) == 40
    (tmp_path / "text.txt").write_text("\n".join(f"{'so very ' * 60} long {i}" for i in range(8)))
    text = ["--text", str(tmp_path / "text.txt")]
    text += ["--tokenizer", str(minilm.weights_folder() / "tokenizer.json")]
    prune = ["prune", str(model), *text, "--sparsity", "2:4", "--output", str(out), "--quiet"]
    assert main([*prune, "--sequence-length", "64"]) == 2
    assert "sequence_length 64: the model has 40 positions" in capsys.readouterr().err
    assert main(prune) == 0  # not the usual 128
    check = ["verify", str(out), "--dense", str(model), "--sparsity", "2:4"]
    assert main([*check, *text, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["relative_error"] > 0
    assert main([*check, "--samples", "3"]) == 2
    assert main(["verify", str(out), "--samples", "3"]) == 2
    assert "samples: says how data are read; give data" in capsys.readouterr().err


def looked_up(nodes: list[onnx.NodeProto], **tables: np.ndarray) -> onnx.ModelProto:
    """Return a model of `input_ids` in which `words` and `table` are looked up and added."""
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["word"]),
        *nodes,
        helper.make_node("Add", ["word", "place"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    draw = np.random.default_rng(0)
    shapes = {"words": (258, 8), "table": (42, 8), "w": (8, 8)}
    tensors = {name: draw.normal(size=shape).astype("f") for name, shape in shapes.items()}
    tensors |= {"zero": np.array(0), "one": np.array(1), "two": np.array(2), **tables}
    ids = helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["b", "s"])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["b", "s", 8])
    weights = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "positions", [ids], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# BART: a Range, and two rows more. RoBERTa: tokens that are no padding are counted, from 2; kinds
# of tokens are looked up by those numbers, which makes no positions of them.
BART = [
    helper.make_node("Shape", ["input_ids"], ["shape"]),
    helper.make_node("Gather", ["shape", "one"], ["length"]),
    helper.make_node("Range", ["zero", "length", "one"], ["places"]),
    helper.make_node("Add", ["places", "two"], ["rows"]),
    helper.make_node("Gather", ["table", "rows"], ["place"]),
]
ROBERTA = [
    helper.make_node("Equal", ["input_ids", "one"], ["padding"]),
    helper.make_node("Not", ["padding"], ["token"]),
    helper.make_node("Cast", ["token"], ["mask"], to=onnx.TensorProto.INT64),
    helper.make_node("CumSum", ["mask", "one"], ["counted"]),
    helper.make_node("Mul", ["counted", "mask"], ["masked"]),
    helper.make_node("Add", ["masked", "one"], ["rows"]),
    helper.make_node("Gather", ["table", "rows"], ["where"]),
    helper.make_node("Gather", ["buffer", "rows"], ["kinds"]),
    helper.make_node("Gather", ["types", "kinds"], ["type"]),
    helper.make_node("Add", ["where", "type"], ["place"]),
]


@pytest.mark.parametrize("nodes", [BART, ROBERTA], ids=["bart", "roberta"])
def test_positions_that_do_not_begin_at_zero(
    nodes: list[onnx.NodeProto], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    types = {"types": np.ones((2, 8), np.float32), "buffer": np.zeros(42, np.int64)}
    onnx.save(looked_up(nodes, **(types if nodes is ROBERTA else {})), tmp_path / "model.onnx")
    assert find_positions(load_model(tmp_path / "model.onnx")) == 40
    (tmp_path / "text.txt").write_text("\n".join(f"{'so very ' * 60} long {i}" for i in range(8)))
    small = Path(__file__).resolve().parents[1] / "data" / "genai-fp32" / "tokenizer.json"
    prune = ["prune", str(tmp_path / "model.onnx"), "--text", str(tmp_path / "text.txt")]
    prune += ["--tokenizer", str(small), "--sparsity", "2:4", "--quiet"]
    prune += ["--output", str(tmp_path / "out.onnx")]
    assert main([*prune, "--sequence-length", "41"]) == 2
    assert "sequence_length 41: the model has 40 positions" in capsys.readouterr().err
    assert main(prune) == 0
    assert main([*prune, "--sequence-length", "40"]) == 0


def test_buckets_of_distances_are_no_positions() -> None:
    """T5 looks up 32 buckets, whatever the length."""
    nodes = [
        helper.make_node("Range", ["zero", "n", "one"], ["places"]),
        helper.make_node("Cast", ["places"], ["real"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Log", ["real"], ["far"]),
        helper.make_node("Cast", ["far"], ["bucket"], to=onnx.TensorProto.INT64),
        helper.make_node("Gather", ["table", "bucket"], ["y"]),
    ]
    weights = {"zero": np.array(0), "one": np.array(1), "table": np.zeros((32, 4), np.float32)}
    graph = helper.make_graph(
        nodes,
        "t5",
        [helper.make_tensor_value_info("n", onnx.TensorProto.INT64, [])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    assert find_positions(load_model(helper.make_model(graph, ir_version=8))) is None
