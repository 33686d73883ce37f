"""Distillation as a stage of `prune`: taken, refused, bounded, and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import iobs_onnx
from iobs_onnx.errors import DataError, GateError, ModelError, OptionError
from iobs_onnx.pruning.distil import memory, stage
from iobs_onnx.pruning.distil.settings import Distilled
from iobs_onnx.pruning.solve import Solve
from iobs_onnx.report.sentences import outcome

FAST = {"preset": "fast", "distill": "model", "distill_steps": 60, "batch_size": 64}


def prune(folder: Path, output: Path, **options: Any) -> iobs_onnx.PruneResult:
    options = {"calibration": folder / "a.npz", "sparsity": "2:4", **FAST, **options}
    return iobs_onnx.prune(folder / "mlp.onnx", output=output, **options)


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def outputs(path: Path, data: Path) -> np.ndarray:
    with np.load(data) as stored:
        return ort.InferenceSession(path).run(None, {"x": stored["x"]})[0]


def test_preset_best_trains_where_it_can_and_says_where_not(
    residual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "BEST_STEPS", 7)
    best = {"preset": "best", "distill": None, "distill_steps": None}
    found = prune(residual, tmp_path / "a.onnx", **best).report
    assert found.options["distill"] == "model"
    assert found.distillation is not None
    assert found.distillation["steps"] == 7

    def refused(*_: Any) -> None:
        raise DataError("there is nothing to judge by")

    monkeypatch.setattr(stage, "require_distillable", refused)
    found = prune(residual, tmp_path / "b.onnx", **best).report
    assert found.options["distill"] == "none"
    note = "preset best trained nothing: there is nothing to judge by"
    assert found.distillation == {"accepted": False, "notes": [note]}
    assert note in outcome(json.loads(found.to_json()))
    with pytest.raises(DataError, match="there is nothing to judge by"):
        prune(residual, tmp_path / "c.onnx", **{**best, "distill": "model"})
    monkeypatch.undo()
    off = prune(residual, tmp_path / "d.onnx", **{**best, "distill": "none"}).report
    assert off.distillation is None


def test_a_step_that_does_not_fit_is_known_before_anything_is_solved(
    residual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    monkeypatch.setattr(Solve, "run", lambda *_: pytest.fail("a site was solved"))
    with pytest.raises(ModelError, match=r"a step keeps over 0\.0 GB .* leave out --distill"):
        prune(residual, tmp_path / "a.onnx")
    monkeypatch.undo()
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    best = {"preset": "best", "distill": None, "distill_steps": None}
    found = prune(residual, tmp_path / "b.onnx", **best).report.distillation
    assert found is not None
    assert "preset best trained nothing: distillation: a step keeps over" in found["notes"][0]


def test_it_comes_nearer_to_the_dense_model_on_other_data(residual: Path, tmp_path: Path) -> None:
    plain, trained = tmp_path / "plain.onnx", tmp_path / "trained.onnx"
    prune(residual, plain, distill="none", distill_steps=None)
    result = prune(residual, trained)
    found = result.report.distillation
    assert found is not None
    assert found["accepted"]
    assert found["after"] < found["before"]
    assert found["losses"] == {"block2": "mse"}
    dense = outputs(residual / "mlp.onnx", residual / "b.npz")
    errors = [np.linalg.norm(outputs(p, residual / "b.npz") - dense) for p in (plain, trained)]
    assert errors[1] < 0.95 * errors[0]
    before, after = tensors(plain), tensors(trained)
    for name, tensor in after.items():
        if name.endswith("bias"):
            assert not np.array_equal(tensor, before[name])
        else:
            np.testing.assert_array_equal(tensor != 0, before[name] != 0)
    assert iobs_onnx.verify(trained, sparsity="2:4").ok
    report = json.loads(result.report.to_json())
    assert report["distillation"]["curve"][0][1] is None


@pytest.mark.parametrize("distill", ["blocks", "model"])
def test_what_was_trained_is_rounded_to_int8(residual: Path, tmp_path: Path, distill: str) -> None:
    """Nearer than rounding without training, and each site's rounding beats the nearest."""
    plain, trained, floats = (tmp_path / f"{name}.onnx" for name in ("plain", "trained", "floats"))
    prune(residual, plain, distill="none", distill_steps=None, quantize="int8")
    prune(residual, floats, distill=distill)
    result = prune(residual, trained, distill=distill, quantize="int8")
    before, after = tensors(floats), tensors(trained)
    for site in result.report.sites:
        assert site.quantized == "int8"
        assert site.nearest_error is not None
        assert site.layer_error < site.nearest_error
        codes, scale = after[f"{site.name}_quantized"], after[f"{site.name}_scale"]
        assert codes.dtype == np.int8
        weight = before[site.name]
        np.testing.assert_array_equal((codes != 0) & (weight == 0), False)
        # Half a step is the nearest; making up for the others takes some weights further.
        assert np.abs(codes * scale - weight).max() < 4 * scale.max()
        bias = f"{site.name}.bias"
        np.testing.assert_array_equal(after[bias], before[bias])  # as trained, not as it was moved
    dense = outputs(residual / "mlp.onnx", residual / "b.npz")
    errors = [np.linalg.norm(outputs(p, residual / "b.npz") - dense) for p in (plain, trained)]
    assert errors[1] < 0.97 * errors[0]


def test_a_time_is_planned_for(residual: Path, tmp_path: Path) -> None:
    found = prune(residual, tmp_path / "out.onnx", distill_steps=None, distill_time="0.5s")
    assert found.report.options["distill_time"] == 0.5
    assert found.report.distillation is not None
    assert found.report.distillation["steps"] >= 1


def test_what_does_not_help_is_not_taken(
    residual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, refused = tmp_path / "plain.onnx", tmp_path / "refused.onnx"
    prune(residual, plain, distill="none", distill_steps=None)
    never = Distilled({}, ((0, None, 1.0),), 1.0, 1.0, False, 1, 1, 1, 0.0, 1e-3, {}, 0, "float32")
    monkeypatch.setattr(stage, "distil", lambda *_, **__: never)
    result = prune(residual, refused)
    assert result.report.distillation is not None
    assert not result.report.distillation["accepted"]
    assert refused.read_bytes() == plain.read_bytes()


def test_a_metric_that_falls_refuses_it(residual: Path, tmp_path: Path) -> None:
    plain, refused = tmp_path / "plain.onnx", tmp_path / "refused.onnx"
    calls: list[str] = []

    def falls(path: str) -> float:
        calls.append(path)
        return -float(len(calls))

    prune(residual, plain, distill="none", distill_steps=None)
    found = prune(residual, refused, metric=falls).report.distillation
    assert found is not None
    assert not found["accepted"]
    assert found["notes"][-1] == "the metric did not rise: it is not taken"
    assert refused.read_bytes() == plain.read_bytes()


def test_sites_go_back_to_dense_behind_it(residual: Path, tmp_path: Path) -> None:
    whole = prune(residual, tmp_path / "whole.onnx").report
    bound = 0.7 * whole.verification[0].relative_error
    result = prune(residual, tmp_path / "bounded.onnx", budget_error=bound)
    assert result.report.verification[0].relative_error <= bound
    dense, found = tensors(residual / "mlp.onnx"), tensors(tmp_path / "bounded.onnx")
    back = [item["initializer"] for item in result.report.declined]
    assert back
    for name in back:
        np.testing.assert_array_equal(found[name], dense[name])


def test_what_cannot_be_is_said_before_the_work(residual: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    with pytest.raises(
        OptionError, match="distill_steps 60: goes with distill blocks, model or both"
    ):
        prune(residual, output, distill="none")
    with pytest.raises(
        OptionError, match=r"distill_time 60.0: goes with distill blocks, model or both"
    ):
        prune(residual, output, distill="none", distill_steps=None, distill_time="1min")
    with pytest.raises(OptionError, match="'soon': expected a time such as 90s"):
        prune(residual, output, distill_time="soon")
    one = [{"x": np.ones((1, 16), np.float32)}]
    with pytest.raises(DataError, match="leave no sample to hold out"):
        prune(residual, output, calibration=one, batch_size=None)
    with pytest.raises(GateError):
        prune(residual, output, max_output_error=1e-6)
    assert not output.exists()


@pytest.mark.parametrize(("accepted", "end"), [(True, ""), (False, "; not taken, the weights are")])
def test_the_report_tells_of_it(accepted: bool, end: str) -> None:
    facts = {"steps": 60, "before": 0.5, "after": 0.25, "accepted": accepted, "notes": ["a note"]}
    report = {"distillation": facts, "totals": {}, "output": {}, "model": {}}
    told, note = outcome(report)
    assert told.startswith(f"distilled for 60 steps: held-out loss 0.5 before, 0.25 after{end}")
    assert note == "a note"
