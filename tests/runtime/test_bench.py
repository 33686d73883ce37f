"""What is timed, in which order, and what is said about it; never how long it took."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from iobs_onnx.cli import main
from iobs_onnx.errors import DependencyError, OptionError
from iobs_onnx.runtime.bench import interleave, present_engines
from iobs_onnx.timing import bench


def model(path: Path, batch: object = "n") -> Path:
    """A linear (16, 16) whose weight holds 2:4."""
    weight = np.tile(np.float32([[1, 0], [0, 1], [1, 1], [0, 0]]), (4, 8))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "one",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, 16])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [batch, 16])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )
    return path


def test_rounds_are_interleaved_and_warm_up_does_not_count() -> None:
    order: list[str] = []
    seconds = iter(range(1000))
    times = interleave(
        [lambda: order.append("d")],
        [lambda: order.append("s")],
        3,
        lambda: float(next(seconds)),
    )
    assert "".join(order) == "dssddssdds"
    assert times == [(1.0, 1.0)] * 3


def test_random_feeds_give_one_row_and_a_batch(tmp_path: Path) -> None:
    path = model(tmp_path / "a.onnx")
    found = bench(path, path, engines=["cpu"], rounds=3)
    assert [timing.batch for timing in found.timings] == [1, 16]
    for timing in found.timings:
        assert timing.rounds == 3
        low, high = timing.speedup_range
        assert low <= timing.speedup <= high
        assert timing.batch is not None
        assert timing.dense_per_second == pytest.approx(1000 * timing.batch / timing.dense_ms)
    assert any("no kernel of ONNX Runtime uses the zeros" in note for note in found.notes)


def test_a_fixed_batch_and_data_are_taken_as_they_are(tmp_path: Path) -> None:
    fixed = model(tmp_path / "fixed.onnx", batch=4)
    assert [t.batch for t in bench(fixed, fixed, rounds=1).timings if t.engine == "cpu"] == [4]
    path = model(tmp_path / "a.onnx")
    feeds = [{"x": np.zeros((rows, 16), np.float32)} for rows in (2, 5)]
    (timing,) = bench(path, path, data=feeds, engines=["cpu"], rounds=1).timings
    assert timing.batch is None
    arrays = {"x": np.zeros((10, 16), np.float32)}
    (timing,) = bench(path, path, data=arrays, engines=["cpu"], batch_size=5, rounds=1).timings
    assert timing.batch == 5


def test_an_engine_asked_for_by_name_must_be_there(tmp_path: Path) -> None:
    path = model(tmp_path / "a.onnx")
    for engine in {"cuda", "tensorrt"} - set(present_engines()):
        with pytest.raises(DependencyError, match=f"engine {engine}"):
            bench(path, path, engines=[engine])  # type: ignore[list-item]
    with pytest.raises(OptionError, match="rounds 0"):
        bench(path, path, rounds=0)
    with pytest.raises(OptionError, match="'tpu' is unknown"):
        bench(path, path, engines=["tpu"])  # type: ignore[list-item]


def test_one_matrix_of_each_shape_is_offered_to_cusparselt(tmp_path: Path) -> None:
    from iobs_onnx.passes import load_model
    from iobs_onnx.timing import _matrices

    (matrix,) = _matrices(load_model(model(tmp_path / "a.onnx")))
    kept = (matrix.numpy() != 0).reshape(16, 4, 4).sum(-1)
    assert (kept == 2).all()


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys) -> None:
    path = str(model(tmp_path / "a.onnx"))
    assert main(["bench", path, path, "--engine", "cpu", "--rounds", "2"]) == 0
    printed = capsys.readouterr().out
    assert "speed-up" in printed
    assert "uses the zeros" in printed
    assert main(["bench", path, path, "--engine", "cpu", "--rounds", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [timing["batch"] for timing in found["timings"]] == [1, 16]
    assert main(["bench", path, str(tmp_path / "absent.onnx")]) == 2
    assert "absent.onnx" in capsys.readouterr().err
