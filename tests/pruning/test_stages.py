"""Stages of a walk: what is taken, what is kept on disk, and any number of shards."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from iobs_onnx.config import make_config
from iobs_onnx.engine import Engine
from iobs_onnx.passes import find_sites, load_model, prepare
from iobs_onnx.pruning.checkpoint import Checkpoint
from iobs_onnx.pruning.executor import LocalExecutor
from iobs_onnx.pruning.judge import Judge
from iobs_onnx.pruning.records import Run, SolvedSite
from iobs_onnx.pruning.rounds import Rounds
from iobs_onnx.pruning.shard import Pair, Place, Shard, deal
from iobs_onnx.pruning.solve import Solve
from iobs_onnx.pruning.stages import Proposal, SegmentStage, Work
from iobs_onnx.pruning.walk import Route, Walk
from iobs_onnx.runtime import Data, Store, Sums
from iobs_onnx.site import Site


@dataclass(frozen=True)
class Halve:
    """Halve the weights, and claim a held-out error for that."""

    after: float | None
    before: float | None = 1.0
    calls: list[str] = field(default_factory=list)
    name: str = "halve"

    def run(self, work: Work, advance: Callable[[], None]) -> Proposal:
        sites = {}
        for site in work.segment.sites:
            advance()
            self.calls.append(site.name)
            solved = work.start[site]
            sites[site] = replace(solved, weight=ir.Tensor(solved.weight.numpy() / 2))
        return Proposal(sites, self.before, self.after)


@pytest.fixture
def run(mlp: Path, tmp_path: Path) -> Run:
    dense = load_model(mlp / "mlp.onnx")
    sites = find_sites(dense).sites
    config = make_config({"sparsity": "2:4", "preset": "fast"})
    with np.load(mlp / "a.npz") as stored:
        feeds = [{"x": part} for part in np.array_split(stored["x"], 8)]
    data = Data(feeds[:6], feeds[6:], 6, 192, 64)
    engine = Engine("cpu", 1 << 30, tmp_path)
    patterns = dict.fromkeys(sites, config.sparsity)
    return Run(dense, sites, patterns, data, config, engine, torch.device("cpu"))


def weights(
    run: Run, stages: list[SegmentStage], folder: Path, advance: Callable[[], None] = lambda: None
) -> dict[str, np.ndarray]:
    folder.mkdir(exist_ok=True)
    judge = Judge(run.dense, run.data, run.engine)
    rounds = Rounds(run, Route.of(run), stages, Checkpoint(folder), judge)
    found = rounds.walk(advance).pruned.sites
    return {site.name: item.weight.numpy().copy() for site, item in found.items()}


def test_a_proposal_is_taken_only_where_its_held_out_error_falls(run: Run, tmp_path: Path) -> None:
    solved = weights(run, [Solve()], tmp_path / "solved")
    for index, (after, before) in enumerate(
        [(1.0, 1.0), (1.5, 1.0), (float("nan"), 1.0), (None, 1.0)]
    ):
        refused = weights(run, [Solve(), Halve(after, before)], tmp_path / f"refused{index}")
        for name, weight in solved.items():
            np.testing.assert_array_equal(refused[name], weight)
    for index, (after, before) in enumerate([(0.5, 1.0), (None, None)]):
        taken = weights(run, [Solve(), Halve(after, before)], tmp_path / f"taken{index}")
        # The first site reads the same inputs either way.
        np.testing.assert_array_equal(2 * taken["w0"], solved["w0"])
        assert all((weight != 0).mean() == 0.5 for weight in taken.values())


def test_each_stage_is_kept_on_disk_and_not_run_again(run: Run, tmp_path: Path) -> None:
    first = Halve(0.5)
    whole = weights(run, [Solve(), first], tmp_path / "work")
    assert first.calls == ["w0", "w1", "w2", "w3"]
    names = sorted(path.stem for path in (tmp_path / "work").glob("*segment*.json"))
    assert names == sorted(
        f"round-1-segment-{i:04d}-{stage}" for i in range(4) for stage in ("solve", "halve")
    )
    # Cut off before the second stage of the third segment.
    for lost in ("0002-halve", "0003-solve", "0003-halve"):
        (tmp_path / "work" / f"round-1-segment-{lost}.json").unlink()
    again, steps = Halve(0.5), []
    found = weights(run, [Solve(), again], tmp_path / "work", lambda: steps.append(1))
    assert again.calls == ["w2", "w3"]
    assert len(steps) == 4 * (6 + 2)  # four segments: six batches, and a site in two stages
    for name, weight in whole.items():
        np.testing.assert_array_equal(found[name], weight)


class Merging(LocalExecutor):
    """Sums every shard on its own, and merges: as workers do."""

    def measure(self, segment: Any, taps: Any, beside: Any, advance: Any) -> Sums:
        sums = [shard.measure(segment, taps, beside, advance=advance) for shard in self._shards]
        for other in sums[1:]:
            sums[0].merge(other)
        self._models.close()
        return sums[0]


def test_shards_count_the_same_bits_wherever_they_are_summed(run: Run, tmp_path: Path) -> None:
    def walked(count: int, kind: type[LocalExecutor], **options: str) -> dict[Site, SolvedSite]:
        config = make_config({"sparsity": "2:4", "preset": "fast", **options})
        own = replace(run, config=config)
        route = Route.of(own)
        working = prepare(own.dense, own.sites)
        feeds = list(own.data.calibration)
        place = Place(own.engine, own.engine.store(), config, own.device)
        models = Pair(place, route.model, working, differ=False)
        shards = [Shard(models, feeds[i * 6 // count : (i + 1) * 6 // count]) for i in range(count)]
        folder = tmp_path / f"{count}-{kind.__name__}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return (
            Walk(
                own,
                route,
                1,
                {},
                stages=[Solve()],
                executor=kind(models, shards),
                checkpoint=Checkpoint(folder),
                advance=lambda: None,
            )
            .run()
            .sites
        )

    for options in ({}, {"target": "layer"}, {"sequential": "none"}):
        whole, parted, merged = (
            walked(count, kind, **options)
            for count, kind in ((1, LocalExecutor), (4, LocalExecutor), (4, Merging))
        )
        for site, item in whole.items():
            other = parted[site].measured
            assert other.rows == item.measured.rows == 192
            # Sums in another order, rounded to float32: no choice in these layers is that close.
            assert other.layer_error == pytest.approx(item.measured.layer_error, rel=1e-3)
            np.testing.assert_array_equal(parted[site].weight.numpy(), merged[site].weight.numpy())


@pytest.mark.parametrize("count", [1, 5, 16, 37])
def test_feeds_are_dealt_in_runs_whether_counted_or_not(count: int, tmp_path: Path) -> None:
    feeds = [({"x": np.full(3, i)}, 1.0 + i % 2) for i in range(count)]
    for known in (count, None):
        for budget in (0, 1 << 20):
            dealt = deal(iter(feeds), known, Store(tmp_path, budget))
            assert len(dealt) == min(count, 16)
            parts = [list(shard) for shard in dealt]
            assert {len(part) for part in parts} <= {count // len(dealt), -(-count // len(dealt))}
            found = [(int(feed["x"][0]), weight) for part in parts for feed, weight in part]
            assert found == [(i, 1.0 + i % 2) for i in range(count)]
    assert not list(tmp_path.iterdir())
    assert [list(shard) for shard in deal([], None, Store(tmp_path, 0))] == [[]]


@dataclass(frozen=True)
class Watched:
    """Another stage, and the error towards the dense weights of each output before and after."""

    stage: SegmentStage
    seen: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    name: str = "watched"

    def run(self, work: Work, advance: Callable[[], None]) -> Proposal:
        proposal = self.stage.run(work, advance)
        for site in work.segment.sites:
            dense = site.to_matrices(work.stored[site.initializer].tensor.numpy())
            hessian = work.hessians[site.taps[0]].matrix
            errors = []
            for solved in (work.start[site], proposal.sites[site]):
                away = torch.from_numpy(dense - site.to_matrices(solved.weight.numpy()))
                errors.append(((away @ hessian) * away).sum(-1))
            self.seen.append((errors[0], errors[1]))
        return proposal


def test_the_stage_of_the_documentation_works(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Least squares cannot raise the error of an output, and lowers that of some."""
    page = Path(__file__).parents[2] / "docs" / "adding-a-stage.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where dataclasses look
    exec(code, module.__dict__)
    watched = Watched(module.Rescale())
    solved = weights(run, [Solve()], tmp_path / "solved")
    scaled = weights(run, [Solve(), watched], tmp_path / "scaled")
    assert len(watched.seen) == 4
    for before, after in watched.seen:
        # Rounding of float32.
        assert (after <= before * (1 + 1e-4)).all()
    assert any((after < 0.999 * before).any() for before, after in watched.seen)
    assert np.array_equal(scaled["w0"] != 0, solved["w0"] != 0)
