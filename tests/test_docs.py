"""The commands in the docs, run as they stand there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from docs_commands import commands, run
from onnx import TensorProto, helper, numpy_helper


def network(
    path: Path, nodes: list[onnx.NodeProto], shape: list[object], **weights: np.ndarray
) -> None:
    """Save a model from `x` to `y`."""
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", *("abc"[: len(shape) - 1])])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path
    )


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, minilm_model: Path) -> Path:
    """A user's folder: models, and data of every kind."""
    import minilm
    import pyarrow
    import soundfile
    from PIL import Image
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("docs")
    (root / "encoder.onnx").symlink_to(minilm_model)
    (root / "tokenizer.json").symlink_to(minilm.weights_folder() / "tokenizer.json")
    for name in ("texts", "images", "recordings"):
        (root / name).mkdir()
    (root / "texts" / "a.txt").write_text("\n".join(minilm.docstrings(128)))

    for at in range(20):
        pixels = np.random.default_rng(at).integers(0, 256, (40, 36, 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{at}.png")
    convolutions = [
        helper.make_node("Conv", ["x", "stem"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "w"], ["y"]),
    ]
    image = {"stem": weights(8, 3, 3, 3), "w": weights(8, 8, 3, 3)}
    network(root / "classifier.onnx", convolutions, ["n", 3, "h", "w"], **image)
    asked = {"size": 32, "do_center_crop": True, "crop_size": 32, "do_normalize": False}
    (root / "preprocessor_config.json").write_text(json.dumps(asked))

    wave = {"stem": weights(8, 1, 16), "w": weights(8, 8, 3)}
    network(root / "speech.onnx", convolutions, ["n", 1, "t"], **wave)
    (root / "audio.json").write_text('{"sampling_rate": 16000}')
    rng = np.random.default_rng(0)
    for at in range(4):
        soundfile.write(root / "recordings" / f"{at}.wav", rng.uniform(-1, 1, 8000), 8000)

    product = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    network(root / "linear.onnx", product, ["n", 8], w=weights(8, 8))
    rows = [{"x": row, "id": at} for at, row in enumerate(rng.normal(size=(64, 8)).tolist())]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / "rows.parquet")
    np.savez(root / "rows.npz", x=np.array([row["x"] for row in rows], np.float32))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("block", commands("calibration.md"))
def test_calibration(folder: Path, block: str) -> None:
    printed = run(block, folder)
    assert ("CALIBRATED ON RANDOM NUMBERS" in printed) == ("random" in block)
    # The first convolution of these two has no four channels to choose from.
    only = " --include w" if "classifier" in block or "speech" in block else ""
    run(f"iobs-onnx verify sparse.onnx --sparsity 2:4{only}", folder)
