"""Which data a run calibrates on, from the command line to the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from iobs_onnx.cli import main
from iobs_onnx.runtime.data.random_numbers import WARNING


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A table of 30,522 vectors of 8, and a linear over them."""
    rng = np.random.default_rng(0)
    arrays = {
        "table": rng.normal(size=(30522, 8)).astype(np.float32),
        "w": rng.normal(size=(8, 8)).astype(np.float32),
    }
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", 8])
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "toy", [ids], [y], weights)
    toy = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(toy, tmp_path / "toy.onnx")
    return tmp_path / "toy.onnx"


def run(model: Path, *flags: str) -> int:
    folder = model.parent
    out = ("--output", str(folder / "out.onnx"), "--report-dir", str(folder))
    return main(["prune", str(model), "--sparsity", "2:4", *out, *flags])


def test_text_from_the_command_line_with_the_tokenizer_beside_the_model(model: Path) -> None:
    import minilm

    folder = model.parent
    (folder / "text.txt").write_text("\n".join(minilm.docstrings(40)))
    tokenizer = minilm.weights_folder() / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    flags = ("--text", str(folder / "text.txt"), "--sequence-length", "16", "--pack", "--quiet")
    assert run(model, *flags, "--samples", "30") == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["calibration"]["source"] == f"text {folder / 'text.txt'}"
    assert report["calibration"]["samples"] == 30
    assert report["options"]["pack"] is True


@pytest.mark.parametrize(("kind", "shape"), [("images", [3, 4, 4]), ("audio", [16])])
def test_the_preprocessor_beside_the_model(kind: str, shape: list[int], tmp_path: Path) -> None:
    """In the folder above, too, which is where Optimum keeps it."""
    import soundfile
    from PIL import Image

    rng = np.random.default_rng(0)
    data = tmp_path / "onnx" / "data"
    data.mkdir(parents=True)
    for at in range(16):
        pixels = rng.integers(0, 256, (9, 7, 3), np.uint8)
        Image.fromarray(pixels).save(data / f"{at}.png")
        soundfile.write(data / f"{at}.wav", rng.uniform(-1, 1, 64), 8000)
    (tmp_path / "preprocessor_config.json").write_text('{"size": [4, 4], "sampling_rate": 8000}')
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", *shape[:-1], 8])],
        [numpy_helper.from_array(rng.normal(size=(shape[-1], 8)).astype(np.float32), "w")],
    )
    toy = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(toy, tmp_path / "onnx" / "toy.onnx")
    assert run(tmp_path / "onnx" / "toy.onnx", f"--{kind}", str(data), "--quiet") == 0
    report = json.loads((tmp_path / "onnx" / "report.json").read_text())
    assert report["calibration"]["source"] == f"{kind} {data}"


def test_random_data_warn_loudly(model: Path, capsys, caplog) -> None:
    assert run(model, "--calibration", "random") == 0
    assert WARNING in caplog.text
    assert "CALIBRATED ON RANDOM NUMBERS" in capsys.readouterr().out
    report = json.loads((model.parent / "report.json").read_text())
    assert report["calibration"]["notes"] == [WARNING]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "--calibration is missing: give it, or --text, --images or --audio"),
        (["--text", "a", "--images", "b"], "--text and --images: give one of them only"),
        (["--calibration", "self"], "calibration self: no output is a number for each of 30522"),
        (["--calibration", "random", "--start-token", "1"], "start_token: goes with calibration"),
        (["--text", "a"], "--tokenizer is missing, and no tokenizer.json is beside the model"),
        (["--images", "a"], "--preprocess is missing"),
        (["--calibration", "random", "--pack"], "pack: goes with text, not with calibration"),
        (["--calibration", "a.npz", "--sequence-length", "8"], "sequence_length: goes with text"),
        (["--calibration", "random", "--sequence-length", "0"], "sequence_length 0"),
    ],
)
def test_options_that_do_not_go_together_are_named(
    model: Path, flags: list[str], text: str, capsys
) -> None:
    assert run(model, *flags) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not (model.parent / "out.onnx").exists()
