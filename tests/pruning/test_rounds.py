"""Rounds, bounds, allocation, several sources, and runs that were cut off."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import iobs_onnx
from iobs_onnx.errors import GateError, OptionError
from iobs_onnx.pruning.checkpoint import Checkpoint
from iobs_onnx.pruning.prior.allocate import GRID, spend


def prune(folder: Path, output: Path, **options: Any) -> iobs_onnx.PruneResult:
    options = {"calibration": folder / "a.npz", "sparsity": "2:4", **options}
    return iobs_onnx.prune(folder / "mlp.onnx", output=output, **options)


def test_the_best_round_is_written(mlp: Path, tmp_path: Path) -> None:
    result = prune(mlp, tmp_path / "out.onnx", rounds=4, learning_rate=1.0)
    rounds = result.report.rounds
    assert [item.round for item in rounds] == [1, 2, 3, 4]
    assert sum(item.batches for item in rounds) == 15  # 256 rows, 25 held out, batches of 16
    errors = [item.error for item in rounds if item.error is not None]
    lowest = list(itertools.accumulate(errors, min))
    assert [item.accepted for item in rounds] == [
        i == 0 or error < lowest[i - 1] for i, error in enumerate(errors)
    ]
    (best,) = [item for item in rounds if item.best]
    assert best.error == min(errors)
    assert result.report.verification[0].relative_error == best.error


def test_a_metric_decides_between_rounds(mlp: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def falling(path: str) -> float:
        onnx.checker.check_model(path)
        seen.append(path)
        return -float(len(seen))

    rounds = prune(mlp, tmp_path / "out.onnx", rounds=3, metric=falling).report.rounds
    assert [item.metric for item in rounds] == [-1.0, -2.0, -3.0]
    assert [item.best for item in rounds] == [True, False, False]


def test_rounds_that_forget_nothing_end_where_one_round_on_all_data_does(
    mlp: Path, tmp_path: Path
) -> None:
    """A site that reads the input, full steps: only the Hessian tells the rounds apart."""
    count = itertools.count()
    options = {
        "include": "w0",
        "learning_rate": 1.0,
        "damping": 1e-6,  # a damped step stops short of the dense weights
        "sparsity": "50%",
        "metric": lambda _: float(next(count)),  # the last round is the best
        "holdout": mlp / "b.npz",
    }

    def weight(**more: Any) -> np.ndarray:
        prune(mlp, tmp_path / "out.onnx", **options, **more)
        (found,) = [w for w in onnx.load(tmp_path / "out.onnx").graph.initializer if w.name == "w0"]
        return numpy_helper.to_array(found)

    whole = weight()
    scale = np.abs(whole).max()
    # Rounding of float32 times the condition of the Hessian, some 1,500.
    assert np.abs(weight(rounds=4, forgetting_factor=1.0) - whole).max() < 1e-3 * scale
    assert np.abs(weight(rounds=4) - whole).max() > 1e-2 * scale
    with pytest.raises(OptionError, match=r"forgetting_factor 0\.5: one round has none before it"):
        weight(forgetting_factor=0.5)


def test_rounds_need_feeds(mlp: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="rounds 99: there are only"):
        prune(mlp, tmp_path / "out.onnx", rounds=99)
    assert not list(tmp_path.iterdir())


def test_sites_are_left_dense_until_the_bound_holds(mlp: Path, tmp_path: Path) -> None:
    free = prune(mlp, tmp_path / "free.onnx")
    error = free.report.verification[0].relative_error
    bounded = prune(mlp, tmp_path / "bounded.onnx", budget_error=0.7 * error)
    assert bounded.report.verification[0].relative_error <= 0.7 * error
    left = [item for item in bounded.report.declined if "must hold" in item["reason"]]
    assert 0 < len(left) < 4
    assert len(left) + len(bounded.report.sites) == 4
    # Those left dense cost the most, and are as they were.
    cost = {site.name: site.layer_error for site in free.report.sites}
    kept = {site.name for site in bounded.report.sites}
    assert max(cost[name] for name in kept) <= min(cost[item["name"]] for item in left)
    dense, sparse = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        for path in (mlp / "mlp.onnx", tmp_path / "bounded.onnx")
    )
    for name in dense:
        assert np.array_equal(dense[name], sparse[name]) == (name not in kept)


def test_a_bound_that_cannot_hold_writes_nothing(mlp: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="held-out output error <= 1e-06"):
        prune(mlp, tmp_path / "out.onnx", budget_error=1e-6)
    assert not list(tmp_path.iterdir())


def test_sources_are_mixed_and_the_holdout_only_judges(mlp: Path, tmp_path: Path) -> None:
    record = prune(
        mlp,
        tmp_path / "out.onnx",
        calibration=[mlp / "a.npz", mlp / "b.npz"],
        holdout=mlp / "c.npz",
    ).report.calibration
    assert (record.samples, record.held_out_samples) == (512, 256)
    assert record.source == f"{mlp / 'a.npz'} + {mlp / 'b.npz'}"


def test_allocation_keeps_the_budget_and_spends_it_better(mlp: Path, tmp_path: Path) -> None:
    uniform = prune(mlp, tmp_path / "u.onnx", sparsity=0.6).report
    error = prune(mlp, tmp_path / "e.onnx", sparsity=0.6, allocate="error").report
    assert error.totals["sparsity"] == pytest.approx(uniform.totals["sparsity"], abs=0.005)
    fractions = {site.sparsity for site in error.sites}
    assert max(fractions) - min(fractions) > 0.01
    totals = [sum(site.layer_error for site in report.sites) for report in (uniform, error)]
    assert totals[1] < totals[0]
    assert uniform.allocation == []
    for share, site in zip(error.allocation, error.sites, strict=True):
        assert share["site"] == site.name
        assert share["removed"] == pytest.approx(site.sparsity, abs=0.01)
        assert [x for x, _ in share["curve"]] == list(GRID)
        # What a quick solver loses on dense activations is near what pruning costs: within 3 times.
        xs, ys = zip(*share["curve"], strict=True)
        expected = np.interp(share["removed"], xs, ys)
        assert expected / 3 < site.layer_error < 3 * expected
        assert sorted(ys) == list(ys)


def test_errors_are_not_measured_beyond_the_grid(mlp: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="up to 95% removed"):
        prune(mlp, tmp_path / "out.onnx", sparsity=0.97, allocate="error")


def test_spend_matches_exhaustive_search() -> None:
    """Two convex curves: against the best of a fine grid of splits, to its spacing."""
    curves = [[x**2 for x in GRID], [3 * x**3 for x in GRID]]
    sizes = np.array([100, 300])
    found = spend(curves, sizes, 0.6)
    assert found @ sizes == pytest.approx(0.6 * sizes.sum())

    def cost(first: float) -> float:
        second = (0.6 * sizes.sum() - first * sizes[0]) / sizes[1]
        if not 0 <= second <= GRID[-1]:
            return np.inf
        pairs = zip(curves, (first, second), strict=True)
        return float(sum(np.interp(x, GRID, curve) for curve, x in pairs))

    best = min(cost(first) for first in np.linspace(0, GRID[-1], 2001))
    assert cost(found[0]) <= best + 1e-9


class _CutOffError(Exception):
    pass


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("mlp", {"rounds": 2, "forgetting_factor": 0.5}),
        ("residual", {"distill": "model", "distill_steps": 5}),
        ("residual", {"distill": "blocks", "distill_steps": 15, "quantize": "int8"}),
    ],
)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(
    model: str,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Cut off before every file that the run keeps, and after the last."""
    mlp = request.getfixturevalue(model)
    whole = tmp_path / "whole.onnx"
    prune(mlp, whole, work_dir=tmp_path / "whole", **options)
    kept = sorted(path.name for path in (tmp_path / "whole").iterdir())
    write, output = Checkpoint._write, tmp_path / "out.onnx"
    for most in range(len(kept)):
        work = tmp_path / f"work{most}"
        left = itertools.count()

        def cut(self: Checkpoint, name: str, content: Any, left=left, most=most) -> None:
            if next(left) == most:
                raise _CutOffError
            write(self, name, content)

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "_write", cut)
            try:
                prune(mlp, output, work_dir=work, **options)
                break  # all was written
            except _CutOffError:
                assert not output.exists()
        prune(mlp, output, work_dir=work, **options)
        assert output.read_bytes() == whole.read_bytes()
        assert sorted(path.name for path in work.iterdir()) == kept
        output.unlink()
    assert most > 6


def test_a_work_dir_belongs_to_one_run(mlp: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    prune(mlp, tmp_path / "a.onnx", work_dir=work)
    with pytest.raises(OptionError, match="other options"):
        prune(mlp, tmp_path / "b.onnx", work_dir=work, damping=0.1)
    with pytest.raises(OptionError, match="other calibration data"):
        prune(mlp, tmp_path / "b.onnx", work_dir=work, calibration=mlp / "b.npz")
    assert not (tmp_path / "b.onnx").exists()
    judged = tmp_path / "judged"
    prune(mlp, tmp_path / "c.onnx", work_dir=judged, holdout=mlp / "b.npz")
    with pytest.raises(OptionError, match="other held-out data"):
        prune(mlp, tmp_path / "d.onnx", work_dir=judged, holdout=mlp / "c.npz")
    with pytest.raises(OptionError, match="give the model as a file"):
        iobs_onnx.prune(
            onnx.load(mlp / "mlp.onnx"),
            calibration=mlp / "a.npz",
            sparsity="2:4",
            work_dir=tmp_path / "w",
        )


def test_the_trace_stands_in_the_report(mlp: Path, tmp_path: Path) -> None:
    report = json.loads(prune(mlp, tmp_path / "out.onnx", rounds=2).report.to_json())
    assert [set(item) for item in report["rounds"]] == [
        {"round", "batches", "error", "metric", "accepted", "best"}
    ] * 2


def test_too_few_rows_are_told(mlp: Path, tmp_path: Path) -> None:
    """Sixteen inputs: 48 rows are three an input, 231 are enough."""
    assert prune(mlp, tmp_path / "out.onnx").report.calibration.notes == []
    (note,) = prune(mlp, tmp_path / "out.onnx", samples=48).report.calibration.notes
    assert note.startswith("4 of 4 sites saw fewer than 4 rows")
    assert "'w0': 48 rows for 16 inputs" in note
