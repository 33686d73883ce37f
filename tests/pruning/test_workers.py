"""Workers without Ray: the same bits from any number of them, whichever are lost on the way."""

from __future__ import annotations

import logging
import pickle
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from iobs_onnx.config import make_config
from iobs_onnx.engine import Engine
from iobs_onnx.errors import DataError, IobsError, OptionError
from iobs_onnx.passes import find_sites, load_model
from iobs_onnx.pruning import worker
from iobs_onnx.pruning.checkpoint import Checkpoint
from iobs_onnx.pruning.executor import Crew, LocalCrew
from iobs_onnx.pruning.judge import Judge
from iobs_onnx.pruning.records import Run
from iobs_onnx.pruning.rounds import Rounds
from iobs_onnx.pruning.solve import Solve
from iobs_onnx.pruning.walk import Route
from iobs_onnx.pruning.workers import RayCrew, dealt_evenly
from iobs_onnx.runtime import Data, NotFinite

# Workers that were killed, which closes nothing.
KILLED: list[Any] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """Close them, so that Python does not complain of folders that nobody closed."""
    yield
    while KILLED:
        KILLED.pop().close()


class LostError(Exception):
    """A worker is gone."""


class GoneError(Exception):
    """What a worker had returned is gone."""


class FullError(Exception):
    """The memory of a worker's node is full."""


class TaskError(Exception):
    """A worker raised its cause."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass
class FakeRay:
    """What the executor takes of Ray, in this process; all that goes to workers is pickled.

    `lose(method)` says whether a worker is lost while it runs a method.
    """

    lose: Callable[[str], bool] = lambda _: False
    full: Exception | None = None  # raised by every call
    lost: int = 0
    sent: list[str] = field(default_factory=list)
    exceptions = SimpleNamespace(
        RayActorError=LostError,
        ObjectLostError=GoneError,
        RayTaskError=TaskError,
        OutOfMemoryError=FullError,
    )

    def put(self, value: Any) -> Any:
        return Reference(pickle.dumps(value))

    def get(self, reference: Any, timeout: float | None = None) -> Any:
        if isinstance(reference.found, Exception):
            raise reference.found
        return pickle.loads(reference.found)

    def remote(self, **options: Any) -> Callable[[type], Any]:
        assert options["num_cpus"] == 1
        return lambda kind: SimpleNamespace(remote=lambda: Actor(self, kind()))

    def kill(self, actor: Any) -> None:
        actor.alive = False
        KILLED.append(actor.instance)


@dataclass
class Reference:
    found: Any


class Actor:
    def __init__(self, ray: FakeRay, instance: Any) -> None:
        self.ray, self.instance, self.alive = ray, instance, True

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: self.call(method, arguments))

    def call(self, method: str, arguments: tuple[Any, ...]) -> Reference:
        given = [self.ray.get(a) if isinstance(a, Reference) else a for a in arguments]
        given = pickle.loads(pickle.dumps(given))
        self.ray.sent.append(method)
        if self.ray.full is not None:
            return Reference(self.ray.full)
        if self.alive and self.ray.lose(method):
            self.alive = False
            self.ray.lost += 1
        if not self.alive:
            return Reference(LostError("gone"))
        try:
            return Reference(pickle.dumps(getattr(self.instance, method)(*given)))
        except IobsError as error:
            return Reference(TaskError(error))


@pytest.fixture
def run(mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(worker, "_fetch", lambda reference: pickle.loads(reference.found))
    dense = load_model(mlp / "mlp.onnx")
    sites = find_sites(dense).sites
    config = make_config({"sparsity": "2:4", "preset": "fast"})
    with np.load(mlp / "a.npz") as stored:
        feeds = [{"x": part} for part in np.array_split(stored["x"], 12)]
    data = Data(feeds[:10], feeds[10:], 10, 192, 64)
    engine = Engine("cpu", 1 << 30, tmp_path)
    patterns = dict.fromkeys(sites, config.sparsity)
    return Run(dense, sites, patterns, data, config, engine, torch.device("cpu"))


def pruned(run: Run, crew: Crew, folder: Path) -> tuple[dict[str, np.ndarray], int]:
    folder.mkdir(parents=True)
    steps: list[int] = []
    judge = Judge(run.dense, run.data, run.engine)
    rounds = Rounds(run, Route.of(run), [Solve()], Checkpoint(folder), judge, crew)
    found = rounds.walk(lambda: steps.append(1)).pruned.sites
    return {site.name: item.weight.numpy().copy() for site, item in found.items()}, len(steps)


def with_options(run: Run, **options: Any) -> Run:
    config = make_config({"sparsity": "2:4", "preset": "fast", **options})
    return Run(**{**vars(run), "config": config})


@pytest.mark.parametrize(
    "options",
    [{}, {"target": "layer"}, {"sequential": "none"}, {"rounds": 2, "forgetting_factor": 0.5}],
    ids=str,
)
def test_any_number_of_workers_gives_the_same_bits(
    run: Run, tmp_path: Path, options: dict[str, Any]
) -> None:
    run = with_options(run, **options)
    expected, steps = pruned(run, LocalCrew(), tmp_path / "local")
    for count in (1, 2, 3, 5):
        ray = FakeRay()
        found, told = pruned(run, RayCrew(ray, count, 0, 1), tmp_path / str(count))
        assert told == steps
        assert "replay" not in ray.sent
        for name, weight in expected.items():
            np.testing.assert_array_equal(found[name], weight)


@dataclass
class Misfortune:
    """Loses one worker in eight calls, never two in a row."""

    chance: random.Random
    row: int = 0
    lost: set[str] = field(default_factory=set)

    def __call__(self, method: str) -> bool:
        gone = method != "close" and not self.row and self.chance.random() < 1 / 8
        self.row = self.row + 1 if gone else 0
        self.lost |= {method} if gone else set()
        return gone


@pytest.mark.parametrize("sequential", ["site", "none"])
def test_lost_workers_change_nothing(
    run: Run, tmp_path: Path, sequential: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they were doing, be it to take the place of another."""
    run = with_options(run, sequential=sequential)
    expected, _ = pruned(run, LocalCrew(), tmp_path / "local")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    lost, times = set(), 0
    for seed in range(4):
        ray = FakeRay(Misfortune(random.Random(seed)))
        found, _ = pruned(run, RayCrew(ray, 1 + seed, 0, 1), tmp_path / f"lost{seed}")
        assert list(temporary.iterdir()) == []  # not what the lost ones had either
        lost |= ray.lose.lost
        times += ray.lost
        for name, weight in expected.items():
            np.testing.assert_array_equal(found[name], weight)
    assert lost >= {"open", "measure", "propagate", "solve"}
    assert times >= 10


def test_errors_come_back_as_they_are_and_name_the_node(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.socket, "gethostname", lambda: "node-7")
    feeds = list(run.data.calibration)
    feeds[6] = {"x": np.full_like(feeds[6]["x"], np.inf)}
    broken = Run(**{**vars(run), "data": Data(feeds, run.data.held_out, 10, 192, 64)})
    where = r"^worker on node-7: activation 'x', batch 6: holds Inf"
    with pytest.raises(DataError, match=where):
        pruned(broken, RayCrew(FakeRay(), 3, 0, 1), tmp_path / "inf")

    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    remedy = "^worker on node-7: out of memory; use fewer --workers, or a smaller --memory-budget$"
    always = RayCrew(FakeRay(lambda method: method == "measure"), 2, 0, 1)
    with pytest.raises(IobsError, match=r"^workers were lost 4 times in a row"):
        pruned(run, always, tmp_path / "always")

    error = FullError("1 worker was killed. Memory on the node (IP: 10.0.0.7, ID: 49) was 22GB")
    with pytest.raises(OptionError, match=r"^worker on 10\.0\.0\.7: out of memory; use fewer"):
        pruned(run, RayCrew(FakeRay(full=error), 2, 0, 1), tmp_path / "killed")
    monkeypatch.setattr(worker.Shard, "measure", full)
    with pytest.raises(OptionError, match=remedy):
        pruned(run, RayCrew(FakeRay(), 2, 0, 1), tmp_path / "memory")


def test_what_workers_log_and_warn_of_is_told_here(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(worker.socket, "gethostname", lambda: "node-7")
    monkeypatch.setattr(logging.getLogger("iobs_onnx"), "level", logging.WARNING)
    measure = worker.Shard.measure

    def talking(*given: Any, **how: Any) -> Any:
        log = logging.getLogger("iobs_onnx.runtime")
        log.warning("100%% of %s", "memory")
        log.info("too much")
        warnings.warn("a matter of numbers", RuntimeWarning, stacklevel=1)
        return measure(*given, **how)

    monkeypatch.setattr(worker.Shard, "measure", talking)
    with pytest.warns(RuntimeWarning) as warned:
        pruned(run, RayCrew(FakeRay(), 2, 0, 1), tmp_path / "talk")
    # Each worker warns of it once, as this process would, and logs it each time.
    assert [str(each.message) for each in warned] == ["worker on node-7: a matter of numbers"] * 2
    assert Path(warned[0].filename) == Path(__file__)
    told = [each for each in caplog.records if each.getMessage().startswith("worker on node-7: ")]
    assert {each.getMessage() for each in told} == {"worker on node-7: 100% of memory"}
    assert {each.name for each in told} == {"iobs_onnx.runtime"}
    assert len(told) == len([e for e in caplog.records if e.getMessage() == "100% of memory"])
    # What was told before an error is told, too.
    caplog.clear()

    def failing(*given: Any, **how: Any) -> None:
        talking(*given, **how)
        raise DataError("no")

    monkeypatch.setattr(worker.Shard, "measure", failing)
    with pytest.warns(RuntimeWarning), pytest.raises(DataError, match=r"^worker on node-7: no$"):
        pruned(run, RayCrew(FakeRay(), 2, 0, 1), tmp_path / "fail")
    assert "worker on node-7: 100% of memory" in caplog.messages


def test_workers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def crew(cpus: int, gpus: int, **options: Any) -> RayCrew:
        ray = SimpleNamespace(
            cluster_resources=lambda: {"CPU": float(cpus), "GPU": float(gpus)},
            nodes=lambda: [{"Alive": True}, {"Alive": True}, {"Alive": False}],
        )
        return RayCrew.of(ray, make_config({"sparsity": "2:4", **options}))

    on_cpu = {"device": "cpu", "provider": "cpu"}
    assert vars(crew(8, 0)) | {"ray": None} == {"ray": None, "workers": 2, "gpus": 0, "nodes": 2}
    assert (crew(8, 4).workers, crew(8, 4).gpus) == (4, 1)
    assert (crew(8, 4, workers=3).workers, crew(8, 4, workers=3, **on_cpu).gpus) == (3, 0)
    with pytest.raises(OptionError, match=r"^workers 5: the cluster has 4 GPUs, one a .*cpu$"):
        crew(8, 4, workers=5)
    with pytest.raises(OptionError, match=r"^workers 9: the cluster has 8 CPUs, one a worker"):
        crew(8, 0, workers=9)


def test_what_is_not_finite_keeps_its_place_between_processes() -> None:
    error = pickle.loads(pickle.dumps(NotFinite("activation 'a' holds NaN", "a", 3)))
    assert (str(error), error.value, error.batch) == ("activation 'a' holds NaN", "a", 3)


def test_feeds_that_grow_are_dealt_out_evenly() -> None:
    """Text in the order of its length would else leave the last worker with the long ones."""
    sizes = [length**2 for length in range(1, 17)]
    homes = dealt_evenly(sizes, 3)
    loads = [sum(s for s, home in zip(sizes, homes, strict=True) if home == k) for k in range(3)]
    assert sum(loads) == sum(sizes)
    assert max(loads) <= sum(sizes) / 3 + max(sizes) / 2
    assert dealt_evenly([1] * 6, 3) == [0, 1, 2] * 2
