"""What goes with a model to another folder, and what does not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import iobs_onnx
from iobs_onnx.errors import GateError, OptionError
from iobs_onnx.passes import load_model, place_of

FEEDS = [{"x": np.random.default_rng(i).normal(size=(8, 32)).astype(np.float32)} for i in range(2)]


@pytest.fixture
def source(make, tmp_path: Path) -> Path:
    """A folder of a model with external data, a configuration, a tokenizer and a subfolder."""
    weight = np.random.default_rng(1).normal(size=(32, 32)).astype(np.float32)
    model = make(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": ["n", 32]}, {"w": weight}, ["y"]
    )
    shaped = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 32])
    model.graph.output[0].CopyFrom(shaped)
    folder = tmp_path / "dense"
    (folder / "more").mkdir(parents=True)
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="m.onnx.data")
    (folder / "genai_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("tokens")
    return folder


def prune(model: Path, output: str) -> iobs_onnx.PruneResult:
    return iobs_onnx.prune(
        model, calibration=FEEDS, sparsity="2:4", solver="magnitude", output=output
    )


def test_the_rest_of_a_model_s_folder_goes_with_it(source: Path, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    result = prune(source / "m.onnx", f"{sparse}{os.sep}")
    assert result.output == str(sparse / "m.onnx")
    names = {"genai_config.json", "tokenizer.json"}
    assert {file.name for file in sparse.iterdir()} == {*names, "m.onnx", "m.onnx.data"}
    assert (sparse / "tokenizer.json").read_text() == "tokens"
    assert iobs_onnx.verify(sparse / "m.onnx", sparsity="2:4").ok
    assert set(result.report.output["beside"]) == names
    # Once more, into the folder that is there: what has changed is replaced.
    (source / "tokenizer.json").write_text("others")
    prune(source / "m.onnx", str(sparse))
    assert (sparse / "tokenizer.json").read_text() == "others"


def test_a_folder_of_all_sorts_stays_where_it_is(source: Path, tmp_path: Path) -> None:
    (source / "genai_config.json").unlink()
    prune(source / "m.onnx", f"{tmp_path / 'sparse'}{os.sep}")
    assert {f.name for f in (tmp_path / "sparse").iterdir()} == {"m.onnx", "m.onnx.data"}


def test_a_failure_copies_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "sparse").mkdir()
    with pytest.raises(GateError):
        iobs_onnx.prune(
            source / "m.onnx",
            calibration=FEEDS,
            sparsity="2:4",
            output=tmp_path / "sparse",
            max_output_error=1e-6,
        )
    assert not any((tmp_path / "sparse").iterdir())


def test_what_cannot_be(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="would overwrite the model"):
        prune(source / "m.onnx", str(source))
    with pytest.raises(OptionError, match="name the file for a model in memory"):
        place_of(tmp_path, load_model(source / "m.onnx"))
    with pytest.raises(OptionError, match="cannot be made"):
        place_of(f"{tmp_path / 'none' / 'sparse'}{os.sep}", source / "m.onnx")
