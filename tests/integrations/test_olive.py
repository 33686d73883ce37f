"""The Olive workflow of the docs, run as it stands there."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from docs_commands import commands, run
from onnx import numpy_helper

from iobs_onnx.config import PruneConfig

pytest.importorskip("olive", reason="Olive is not installed: pip install 'iobs-onnx[olive]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_prune_then_quantize(tmp_path: Path, minilm_model: Path) -> None:
    (tmp_path / "olive").mkdir()
    folder = tmp_path / "olive"
    for name in ("workflow.json", "calibration.py"):
        shutil.copy(EXAMPLES / "olive" / name, folder)
    shutil.copy(EXAMPLES / "minilm.py", tmp_path)  # one folder up, as in the examples
    (folder / "encoder.onnx").symlink_to(minilm_model)
    for block in commands("olive.md"):
        run(block, folder)
    (written,) = folder.glob("quantized/**/*.onnx")
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(written).graph.initializer}
    linears = [
        array
        for name, array in stored.items()
        if array.dtype == np.int8 and array.ndim == 2 and array.shape[0] in (384, 1536)
    ]
    assert len(linears) == 36
    for codes in linears:  # (inputs, outputs)
        assert (np.count_nonzero(codes.T.reshape(-1, 4), axis=1) <= 2).all()


def test_the_package_config_keeps_all_of_olives_passes(tmp_path: Path) -> None:
    from olive.package_config import OlivePackageConfig

    from iobs_onnx.integrations.olive import IOBSPruning, write_package_config

    path = write_package_config(tmp_path / "package.json")
    merged = OlivePackageConfig.parse_file_or_obj(str(path))
    default = OlivePackageConfig.load_default_config()
    assert set(merged.passes) == {*default.passes, "iobspruning"}
    assert merged.import_pass_module("IOBSPruning") is IOBSPruning
    options = {field.name for field in dataclasses.fields(PruneConfig)}
    assert set(IOBSPruning._default_config(None)) == {*options, "data_config"}
    assert json.loads(path.read_text())["extra_dependencies"]
