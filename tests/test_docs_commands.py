"""The commands of the quickstart and of the calibration page, run as they stand there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from docs_commands import DOCS, commands, programs, run, run_python
from onnx import TensorProto, helper, numpy_helper

pytestmark = pytest.mark.slow


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
    two = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("MatMul", ["h", "classifier"], ["y"]),
    ]
    # Near the identity, so that 2:4 stays below the bound of prune.toml.
    both = {"w": np.eye(8, dtype=np.float32) + weights(8, 8) / 10, "classifier": weights(8, 8)}
    network(root / "model.onnx", two, ["n", 8], **both)
    rows = [{"x": row, "id": at} for at, row in enumerate(rng.normal(size=(64, 8)).tolist())]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / "rows.parquet")
    for name in ("rows.npz", "data.npz"):
        np.savez(root / name, x=np.array([row["x"] for row in rows], np.float32))
    return root


@pytest.mark.parametrize("block", commands("calibration.md"))
def test_calibration(folder: Path, block: str) -> None:
    if "tokens.jsonl" in block:
        _write_tokens(folder)
    printed = run(block, folder)
    assert ("CALIBRATED ON RANDOM NUMBERS" in printed) == ("random" in block)
    # The first convolution of these two has no four channels to choose from.
    only = " --include w" if "classifier" in block or "speech" in block else ""
    run(f"iobs-onnx verify sparse.onnx --sparsity 2:4{only}", folder)


def _write_tokens(folder: Path) -> None:
    """Run the program of the page on a SentencePiece model of this very text."""
    import sentencepiece as pieces

    text = str(folder / "texts" / "a.txt")
    pieces.SentencePieceTrainer.train(
        f"--input={text} --model_prefix={folder / 'tokenizer'} --vocab_size=500 --minloglevel=2"
    )
    (program,) = (code for code in programs("calibration.md") if "sentencepiece" in code)
    run_python(program, folder)
    first = json.loads((folder / "tokens.jsonl").read_text().splitlines()[0])
    coder = pieces.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    line = Path(text).read_text().splitlines()[0]
    assert first["input_ids"] == [coder.bos_id(), *coder.encode(line)][:128]


@pytest.mark.parametrize("page", ["../README.md", "index.md", "bench.md"])
def test_the_quickstart(folder: Path, page: str) -> None:
    """What installs, and what `make` does, is tested elsewhere."""
    text = (DOCS / page).read_text()
    _write_toml(folder)
    found = [
        command
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
        for command in re.findall(r"^iobs-onnx (?:.*\\\n)*.*", block, re.M)
    ]
    assert found
    for command in found:
        run(command, folder)


def _write_toml(folder: Path) -> None:
    """Write the `prune.toml` of the quickstart."""
    (toml,) = re.findall(r"^```toml\n(.*?)^```", (DOCS / "index.md").read_text(), re.M | re.S)
    (folder / "prune.toml").write_text(toml)


def test_the_workflow_of_github_actions(folder: Path) -> None:
    """Its steps that call the tool, in order, with the quickstart's `prune.toml`."""
    import yaml

    _write_toml(folder)
    workflow = yaml.safe_load((DOCS.parent / "examples/ci/github-actions.yml").read_text())
    steps = [step.get("run", "") for step in workflow["jobs"]["prune"]["steps"]]
    commands = [step for step in steps if step.startswith("iobs-onnx")]
    assert [command.split()[1] for command in commands] == ["prune", "verify"]
    for command in commands:
        run(command, folder)
    assert (folder / "report" / "report.html").is_file()
