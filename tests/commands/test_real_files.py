"""Files that users hold, through the commands that the documentation names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx

from iobs_onnx.cli import main
from iobs_onnx.passes import load_model
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
