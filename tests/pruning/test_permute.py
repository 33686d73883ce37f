"""`--permute`: the model computes the same, and the layers lose less."""

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

import iobs_onnx
from iobs_onnx.config import make_config
from iobs_onnx.engine import Engine
from iobs_onnx.errors import OptionError
from iobs_onnx.passes import find_sites, load_model, save_model
from iobs_onnx.pruning.prior.permute import permuted
from iobs_onnx.pruning.records import Run
from iobs_onnx.pruning.selection import select
from iobs_onnx.runtime import input_specs, open_data

Feeds = list[dict[str, np.ndarray]]


def outputs(path: Path, feed: dict[str, np.ndarray]) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def reorder(path: Path, feeds: Feeds, scratch: Path) -> list[dict]:
    """Permute a file for 2:4, hold it against the original, and return the records."""
    dense = load_model(path)
    config = make_config({"sparsity": "2:4", "permute": True})
    sites = select(find_sites(dense), [config.sparsity]).sites
    data = open_data(feeds, input_specs(dense), holdout=0)
    engine = Engine("cpu", 2**30, scratch)
    run = Run(dense, sites, {}, data.in_memory(), config, engine, torch.device("cpu"))
    model, records = permuted(run)
    save_model(model, scratch / "permuted.onnx")
    expected = outputs(path, feeds[0])
    found = outputs(scratch / "permuted.onnx", feeds[0])
    # Sums in another order: rounding of float32 over the layers that follow.
    change, largest = np.abs(found - expected).max(), np.abs(expected).max()
    assert change <= 1e-5 * largest
    ratios = [r["after"] / r["before"] if r["taken"] else 1.0 for r in records if "before" in r]
    if ratios:
        logging.getLogger("permute").info(
            "%s: layer error %.3f, geometric mean of %d (%.2f to %.2f), %d taken; "
            "largest change of an output %.1e of %.2g",
            path.stem,
            np.exp(np.log(ratios).mean()),
            len(ratios),
            min(ratios),
            max(ratios),
            sum(r["taken"] for r in records),
            change,
            largest,
        )
    return records


@pytest.fixture
def toy(tmp_path: Path) -> tuple[Path, Feeds]:
    rng = np.random.default_rng(1)

    def array(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[-1]))).astype("f4")

    stored = {"up": array(8, 32), "b": array(32), "down": array(32, 8)}
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["h"]),
        helper.make_node("Add", ["h", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MatMul", ["r", "down"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, 1, ["n", 8]) for name in "xy")
    tensors = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "toy", [x], [y], tensors)
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[opset]), tmp_path / "toy.onnx")
    feeds = [{"x": rng.standard_normal((64, 8)).astype(np.float32)} for _ in range(4)]
    return tmp_path / "toy.onnx", feeds


def test_prune_with_permutation(toy: tuple[Path, Feeds]) -> None:
    path, feeds = toy
    reports = []
    for permute in (False, True):
        # A generator: feeds that can be read only once are kept for the second pass.
        result = iobs_onnx.prune(
            path,
            calibration=(feed for feed in feeds),
            sparsity="2:4",
            output=path.with_name("out.onnx"),
            permute=permute,
            sequential="none",
            target="layer",
            bias_compensation=0,
            provider="cpu",
        )
        reports.append(result.report)
    assert reports[0].permutations == []
    moved, fixed = reports[1].permutations
    assert moved["sites"] == ["down"]
    assert moved["tensors"] == ["b", "down", "up"]
    assert moved["taken"]
    assert moved["after"] < moved["before"]
    assert (fixed["sites"], fixed["reason"]) == (["up"], "'x' comes from outside")
    errors = [{site.name: site.layer_error for site in report.sites} for report in reports]
    assert errors[1]["down"] < errors[0]["down"]
    # Hessian and weight of the other site are the same, its outputs in another order: a search may
    # go the other way at a near tie.
    assert errors[1]["up"] == pytest.approx(errors[0]["up"], rel=0.05)
    result = iobs_onnx.verify(path.with_name("out.onnx"), sparsity="2:4", dense=path, data=feeds)
    assert result.ok
    recorded = reports[1].verification[0]
    assert result.outputs[0]["cosine"] == pytest.approx(recorded.cosine, abs=0.02)


def test_patterns_without_groups_have_no_order(toy: tuple[Path, Feeds]) -> None:
    with pytest.raises(OptionError, match="permute: the order of channels means nothing to"):
        iobs_onnx.prune(toy[0], calibration=toy[1], sparsity=0.5, permute=True)


@pytest.mark.slow
def test_resnet20(shared: Path, tmp_path: Path) -> None:
    with np.load(shared / "data" / "cifar10" / "train_first_2000.npz") as stored:
        images = stored["x"][:512] / 255
    pixels = (images - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    batches = np.split(pixels.transpose(0, 3, 1, 2).astype(np.float32), 8)
    records = reorder(shared / "models" / "resnet20.onnx", [{"x": b} for b in batches], tmp_path)
    found = [record for record in records if "before" in record]
    assert [record["channels"] for record in found] == [16] * 3 + [32] * 3 + [64] * 3
    assert sum(record["taken"] for record in found) >= 7


@pytest.mark.slow
def test_minilm(minilm_model: Path, minilm_feeds: Feeds, tmp_path: Path) -> None:
    records = reorder(minilm_model, minilm_feeds, tmp_path)
    found = [record for record in records if "before" in record]
    assert [record["channels"] for record in found] == [1536] * 6
    assert all(record["after"] < 0.95 * record["before"] for record in found)
