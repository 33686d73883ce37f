"""Pruned models through onnxruntime.quantization: the zeros and the task survive."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import minilm
import numpy as np
import onnx
import pytest
import stsb
from docs_commands import commands, programs, run, run_python
from onnx import numpy_helper

pytestmark = pytest.mark.slow
logger = logging.getLogger(__name__)

(JOINT,) = commands("quantization.md")
AFTER, STATIC = programs("quantization.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, minilm_model: Path) -> Path:
    """A user's folder after the docs: a sparse model, and everything that was made of it."""
    root = tmp_path_factory.mktemp("quantization")
    (root / "encoder.onnx").symlink_to(minilm_model)
    (root / "tokenizer.json").symlink_to(minilm.weights_folder() / "tokenizer.json")
    (root / "texts").mkdir()
    texts = minilm.docstrings(128)
    (root / "texts" / "a.txt").write_text("\n".join(texts))
    minilm.save_feeds(root / "feeds", minilm.feeds(texts))
    run(JOINT, root)
    run_python(STATIC, root)
    run_python(AFTER, root)
    return root


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def zeros(path: Path) -> dict[str, np.ndarray]:
    """Where the encoder's linears are zero, by the weight's name and in its layout."""
    wanted = arrays(path.with_name("sparse.onnx"))
    linears = [n for n, a in wanted.items() if a.ndim == 2 and min(a.shape) >= 384]
    found = arrays(path)
    return {
        name: found[f"{name}_quantized"] == zero_points(found, name)
        for name in linears
        if f"{name}_quantized" in found
    }


def zero_points(found: dict[str, np.ndarray], name: str) -> np.ndarray:
    return found.get(f"{name}_zero_point", np.zeros(1, np.int8))


@pytest.mark.parametrize("kind", ["dynamic", "static", "joint"])
def test_integers_keep_2_4(folder: Path, kind: str) -> None:
    sparse = arrays(folder / "sparse.onnx")
    held = zeros(folder / f"{kind}.onnx")
    linears = {n: z for n, z in held.items() if sparse[n].shape[0] in (384, 1536)}
    assert len(linears) >= 36
    for name, zero in linears.items():
        if kind != "joint":  # which chooses a support of its own
            assert zero[sparse[name] == 0].all()
        if (sparse[name] == 0).mean() >= 0.5:  # not the table of tokens
            groups = (~zero).T.reshape(-1, 4)
            assert (groups.sum(axis=1) <= 2).all(), name


def test_four_bits_keep_2_4(folder: Path) -> None:
    model = onnx.load(folder / "four-bits.onnx")
    found = arrays(folder / "four-bits.onnx")
    nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 36
    for node in nodes:
        # (outputs, blocks of 32 inputs, 16 bytes), two inputs a byte, the lower half first.
        packed = found[node.input[1]]
        halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1, 4)
        assert ((halves != 8).sum(axis=1) <= 2).all()


def test_the_joint_error_is_below_that_of_rounding_afterwards(folder: Path) -> None:
    report = json.loads((folder / "joint/report.json").read_text())
    assert all(site["quantized"] == "int8" for site in report["sites"])
    assert all(site["layer_error"] < site["nearest_error"] for site in report["sites"])
    totals = report["totals"]
    logger.info(
        "joint %.6f, nearest %.6f", *(totals[f"{k}_error_geomean"] for k in ("layer", "nearest"))
    )


def test_the_task(folder: Path, shared: Path) -> None:
    kinds = ("encoder", "sparse", "dynamic", "static", "four-bits", "joint")
    found = {k: stsb.spearman(stsb.embed_with(folder / f"{k}.onnx"), shared, 300) for k in kinds}
    logger.info("STS-B Spearman: %s", {k: round(v, 4) for k, v in found.items()})
    assert found["encoder"] == pytest.approx(0.9334, abs=0.002)  # of the first 300 pairs
    # Few texts calibrate here: what is held to is that quantization takes little more.
    for kind in ("dynamic", "static", "four-bits"):
        assert found[kind] > found["sparse"] - 0.03, kind
    assert found["joint"] > found["encoder"] - 0.08  # fewer texts still, and the fast preset
