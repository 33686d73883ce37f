"""Whole models, segment by segment: against the same computed by hand, and against each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

import iobs_onnx
from iobs_onnx.layer import solve_layer

Feed = dict[str, np.ndarray]
FAST = {"sparsity": "2:4", "solver": "sparsegpt"}


def weights_of(path: Path | str) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def activation(path: Path | str, name: str, feeds: list[Feed]) -> np.ndarray:
    """Rows of one activation over all feeds, without padding, float64."""
    model = onnx.load(path)
    model.graph.output.append(helper.make_empty_tensor_value_info(name))
    session = ort.InferenceSession(model.SerializeToString())
    rows = [session.run([name], feed)[0][feed["attention_mask"] == 1] for feed in feeds]
    return np.concatenate(rows).astype(np.float64)


@pytest.mark.parametrize("target", ["layer", "dense"])
def test_each_site_is_solved_on_what_the_pruned_model_feeds_it(
    minilm_model: Path, minilm_feeds: list[Feed], tmp_path: Path, target: str
) -> None:
    """The last site of layer 1, by hand: activations of the written file and of the dense one."""
    output = tmp_path / "sparse.onnx"
    result = iobs_onnx.prune(
        minilm_model,
        calibration=minilm_feeds,
        output=output,
        include=["*layer.0.*", "*layer.1.*"],
        target=target,
        learning_rate=1.0,
        residual=False,
        bias_compensation=0.0,
        random_tokens=0.0,
        **FAST,
    )
    site = result.report.sites[-1]
    feeds = [feed for i, feed in enumerate(minilm_feeds) if i % 10 != 1]  # 2nd, 12th are held out
    dense, sparse = (activation(path, site.taps[0], feeds) for path in (minilm_model, output))
    assert np.linalg.norm(dense - sparse) > 0.05 * np.linalg.norm(dense)
    hessian = sparse.T @ sparse / len(sparse)
    cross = dense.T @ sparse / len(sparse) if target == "dense" else None
    weight = weights_of(minilm_model)[site.initializer].T.astype(np.float64)
    expected = solve_layer(
        weight, hessian, sparsity="2:4", solver="sparsegpt", cross_gram=cross
    ).weight
    found = weights_of(output)[site.initializer].T
    difference = np.linalg.norm((found - expected) @ np.linalg.cholesky(hessian))
    # float32 sums and ONNX Runtime's other fusions: a few borderline choices differ.
    assert difference < 0.02 * np.linalg.norm(weight @ np.linalg.cholesky(hessian))


def shared_model(request: pytest.FixtureRequest, name: str) -> tuple[Path, list[Feed]]:
    rng = np.random.default_rng(0)
    if name == "minilm":
        feeds = request.getfixturevalue("minilm_feeds")
        return request.getfixturevalue("minilm_model"), feeds
    if name == "magika":
        rows = [rng.integers(0, 257, (4, 2048)).astype(np.int32) for _ in range(3)]
        return request.getfixturevalue("magika_model"), [{"bytes": row} for row in rows]
    shared = request.getfixturevalue("shared")
    if name == "resnet20":
        images = [rng.standard_normal((8, 3, 32, 32)).astype(np.float32) for _ in range(3)]
        return shared / "models" / "resnet20.onnx", [{"x": image} for image in images]
    ids = [rng.integers(3, 30000, (2, 24)) for _ in range(3)]
    return shared / "models" / "stories15M.onnx", [{"input_ids": row} for row in ids]


@pytest.mark.parametrize("name", ["minilm", "magika", "resnet20", "stories15M"])
def test_segmented_and_unsegmented_runs_agree(request: pytest.FixtureRequest, name: str) -> None:
    """One-shot, cut by a small memory budget or not at all: equal up to rounding."""
    model, feeds = shared_model(request, name)
    options = {"calibration": feeds, "sequential": "none", **FAST}
    whole = iobs_onnx.prune(model, **options)
    cut = iobs_onnx.prune(model, **options, memory_budget="200KB")
    assert cut.report.runtime["segments"] > whole.report.runtime["segments"] == 1
    for site, other in zip(whole.report.sites, cut.report.sites, strict=True):
        assert site.name == other.name
        assert site.rows == other.rows
        assert site.layer_error == pytest.approx(other.layer_error, rel=2e-3)
    for output, other in zip(whole.report.verification, cut.report.verification, strict=True):
        assert output.relative_error == pytest.approx(other.relative_error, rel=0.02)


def test_the_defaults_beat_one_shot_on_held_out_text(
    minilm_model: Path, minilm_feeds: list[Feed]
) -> None:
    one_shot = {"sequential": "none", "bias_compensation": 0.0, "random_tokens": 0.0}
    errors = [
        iobs_onnx.prune(minilm_model, calibration=minilm_feeds, **FAST, **options)
        .report.verification[0]
        .relative_error
        for options in ({}, one_shot)
    ]
    assert errors[0] < errors[1]


def test_nothing_changes_at_sparsity_zero(minilm_model: Path, minilm_feeds: list[Feed]) -> None:
    """Two ONNX Runtime sessions round differently: that is not a drift to make up for."""
    result = iobs_onnx.prune(
        minilm_model, calibration=minilm_feeds[:2], sparsity="0%", solver="sparsegpt"
    )
    assert [output.relative_error for output in result.report.verification] == [0.0]
    assert not any(site.bias_compensated for site in result.report.sites)
