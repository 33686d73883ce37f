"""`iobs-onnx distill` on files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from pruning.distil.small_models import encoder, token_feeds

from iobs_onnx.cli import main
from iobs_onnx.pruning.distil import DistilSettings
from iobs_onnx.pruning.distil.run import distil_file


@pytest.fixture
def files(tmp_path: Path) -> Path:
    ir.save(encoder(prune=False)[0], tmp_path / "dense.onnx")
    ir.save(encoder(prune=True)[0], tmp_path / "sparse.onnx")
    feeds = token_feeds(8, seed=1, padding=0)
    rows = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    np.savez(tmp_path / "data.npz", **rows)
    return tmp_path


def run(files: Path, *more: str) -> int:
    paths = [str(files / name) for name in ("dense.onnx", "sparse.onnx")]
    return main(["distill", *paths, "--output", str(files / "out.onnx"), *more])


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_a_model_is_distilled_with_its_zeros_kept(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--calibration", str(files / "data.npz"))
    assert run(files, *data, "--distill-steps", "60", "--batch-size", "8", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["accepted"]
    assert told["after"] < told["before"]
    assert told["steps"] == 60
    before, after = weights(files / "sparse.onnx"), weights(files / "out.onnx")
    for name in ("up", "down"):
        assert not after[name][before[name] == 0].any()
        assert not np.array_equal(after[name], before[name])
    assert np.array_equal(after["table"], before["table"])
    assert run(files, *data, "--distill-steps", "3") == 0
    assert "held-out loss" in capsys.readouterr().out


def test_a_run_that_harms_leaves_the_sparse_model(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--calibration", str(files / "data.npz"))
    assert run(files, *data, "--distill-steps", "10", "--distill-rate", "50") == 0
    assert "left as they were" in capsys.readouterr().out
    before, after = weights(files / "sparse.onnx"), weights(files / "out.onnx")
    assert all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("--calibration", "missing.npz"), "missing.npz"),
        ((), "--calibration is missing"),
        (("--distill-steps", "0"), "steps 0"),
        (("--seed", "-1"), "seed -1"),
        (("--calibration", "self"), "the model cannot write text; give data"),
    ],
)
def test_a_wrong_call_is_told_in_one_line_and_writes_nothing(
    files: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, ...], told: str
) -> None:
    assert run(files, *change) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("iobs-onnx: error:")
    assert told in message
    assert "\n" not in message
    assert not (files / "out.onnx").exists()


def test_a_dense_model_in_place_of_the_sparse_one_is_refused(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = str(files / "dense.onnx")
    call = ["distill", dense, dense, "--calibration", str(files / "data.npz")]
    assert main([*call, "--output", str(files / "out.onnx")]) == 2
    assert "no weight holds a zero" in capsys.readouterr().err


def test_a_time_is_read_and_kept_within(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--calibration", str(files / "data.npz"))
    assert run(files, *data, "--distill-time", "0.5s", "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] >= 1
    assert run(files, *data, "--distill-time", "soon") == 2
    assert "expected a time such as 90s" in capsys.readouterr().err


def test_mirrored_feeds_stand_beside_the_others_once(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--calibration", str(files / "data.npz"), "--batch-size", "8", "--json")
    steps = []
    for more in ((), ("--mirror",)):
        assert run(files, *data, "--distill", "blocks", *more) == 0
        steps.append(json.loads(capsys.readouterr().out)["blocks"]["steps"])
    assert steps[1] == 2 * steps[0] > 0


def test_blocks_and_the_whole_read_the_same_data_once(files: Path) -> None:
    """An iterator has nothing left for a second reading."""
    paths = [files / name for name in ("dense.onnx", "sparse.onnx")]
    found = distil_file(
        *paths,
        calibration=iter(token_feeds(10, seed=1, padding=0)),
        distill="both",
        settings=DistilSettings(steps=12, rate=0.01),
    )
    assert found.blocks is not None
    assert found.distilled is not None
    assert found.blocks["steps"] == found.distilled.steps == 12


def test_full_memory_is_told_in_one_line_and_writes_nothing(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("iobs_onnx.pruning.distil.run.distil", full)
    assert run(files, "--calibration", str(files / "data.npz")) == 2
    assert "distillation: out of memory; make --batch-size" in capsys.readouterr().err
    assert not (files / "out.onnx").exists()
