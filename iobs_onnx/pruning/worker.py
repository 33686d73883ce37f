"""What runs in a worker process: shards of the feeds, and solve tasks."""

from __future__ import annotations

import logging
import socket
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

import torch

from iobs_onnx.config import PruneConfig
from iobs_onnx.engine import Engine, memory_faults
from iobs_onnx.errors import IobsError
from iobs_onnx.hessian import exact_float32
from iobs_onnx.passes import Segment, Shipment, scratch, unpack
from iobs_onnx.pruning.records import SolvedSite
from iobs_onnx.pruning.shard import Pair, Place, Shard
from iobs_onnx.runtime import NotFinite, Sums, find_device
from iobs_onnx.site import Site, Tap
from iobs_onnx.solvers import Problem, Solver, Sparse

_PACKAGE = "iobs_onnx"
# What to do where the memory of a worker is full.
FEWER = "use fewer --workers, or a smaller --memory-budget"


# A warning of Python: its text and category, and where it was raised.
Warned: TypeAlias = tuple[str, type[Warning], str, int]


@dataclass(frozen=True)
class Told:
    """What a worker logged, and what Python warned of there, since it was last asked."""

    records: list[logging.LogRecord]
    warned: list[Warned]

    def retell(self) -> None:
        """Log and warn of it here, where it goes as if it had happened here."""
        for record in self.records:
            log = logging.getLogger(record.name)
            if log.isEnabledFor(record.levelno):
                log.handle(record)
        for warned in self.warned:
            warnings.warn_explicit(*warned)


@dataclass(frozen=True)
class Plan:
    """What every worker of a walk is told.

    Attributes:
        config: the options.
        models: the dense one, and the one as pruned so far, with every value that taps read.
        differ: whether they differ before any site of this walk is solved.
        budget: bytes of activations that a worker holds in memory.
        threads: of each worker.
        level: of what it logs.
    """

    config: PruneConfig
    models: Shipment
    differ: bool
    budget: int
    threads: int
    level: int


class Worker:
    """Some shards of one walk, in a process of their own.

    Errors that it raises name its node. Whoever calls it may lose it: what it holds can be made
    again from the feeds and the solved segments, by :meth:`replay`.
    """

    def __init__(self) -> None:
        self._held = ExitStack()
        self._node = f"worker on {socket.gethostname()}"
        self._records: SimpleQueue[logging.LogRecord] = SimpleQueue()
        self._handler = QueueHandler(self._records)
        self._handler.setFormatter(logging.Formatter(f"{self._node}: %(message)s"))
        self._warned: dict[Warned, bool] = {}  # to whether the driver knows

    def open(self, plan: Plan, feeds: Mapping[int, Any]) -> tuple[str, Path]:
        """Load the models; fetch the feeds of shards, by their numbers.

        Returns:
            This machine, and the folder that it leaves there if it is killed.
        """
        logging.getLogger(_PACKAGE).setLevel(plan.level)
        self._held.close()  # it may be told twice, in the place of a lost one
        with self._named():
            torch.set_num_threads(plan.threads)
            folder = self._held.enter_context(scratch())
            config = plan.config
            device = find_device(config.device)
            engine = Engine(config.provider, plan.budget, folder, plan.threads, device)
            place = Place(engine, engine.store(), config, device)
            self._models = Pair(place, *unpack(plan.models), differ=plan.differ)
            self._shards = {
                number: Shard(self._models, _fetch(items)) for number, items in feeds.items()
            }
            return socket.gethostname(), folder

    def close(self) -> Told:
        """Leave nothing on disk."""
        self._held.close()
        return self._told()

    def measure(
        self,
        number: int,
        segment: Segment,
        taps: Sequence[Tap],
        beside: Collection[tuple[Tap, Tap]],
        first: int = 0,
    ) -> Sums:
        """Return the sums over one shard, in host memory; see :meth:`Shard.measure`."""
        with self._named():
            sums = self._shards[number].measure(segment, taps, beside, first=first)
            sums.move(torch.device("cpu"))
            return sums

    def propagate(
        self, segment: Segment, solved: Mapping[Site, SolvedSite]
    ) -> tuple[str | None, dict[str, object], Told]:
        """Run a segment with its new weights over all shards, and forget it.

        Returns:
            The execution provider that ran it, what was used otherwise, and what was told.
        """
        with self._named():
            self._pass(segment, solved)
        engine = self._models.place.engine
        return engine.ran(segment), engine.used(), self._told()

    def _pass(self, segment: Segment, solved: Mapping[Site, SolvedSite]) -> None:
        self._models.close()
        self._models.rewrite(solved)
        for shard in self._shards.values():
            shard.propagate(segment)
        self._models.forget(segment)

    def replay(self, done: Sequence[tuple[Segment, Any]]) -> None:
        """Bring fresh shards behind solved segments.

        Args:
            done: segments, and references to their solved sites.
        """
        for segment, solved in done:
            for number in self._shards:
                self.measure(number, segment, (), ())
            with self._named():
                self._pass(segment, _fetch(solved))

    def solve(self, solver: Solver, problem: Problem, hessian: torch.Tensor) -> Sparse:
        """Solve a problem, which comes without its Hessian, on this worker's device."""
        with self._named(), exact_float32():
            whole = replace(problem, hessian=hessian).on(self._models.place.device)
            found = solver.solve(whole)
            return Sparse(found.weight.cpu(), found.mask.cpu())

    def _told(self) -> Told:
        records = [self._records.get() for _ in range(self._records.qsize())]
        fresh = [warned for warned, known in self._warned.items() if not known]
        self._warned |= dict.fromkeys(fresh, True)
        return Told(records, fresh)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Let errors and what is logged name the node, and say what to do where memory is full."""
        with memory_faults(self._node, FEWER), self._listening():
            try:
                yield
            except NotFinite as error:
                raise NotFinite(f"{self._node}: {error}", error.value, error.batch) from error
            except IobsError as error:
                raise type(error)(f"{self._node}: {error}") from error

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Keep what is logged and warned of, for the driver."""
        log = logging.getLogger(_PACKAGE)
        log.addHandler(self._handler)
        with warnings.catch_warnings(record=True) as caught:
            try:
                yield
            finally:
                log.removeHandler(self._handler)
                for each in caught:
                    text = f"{self._node}: {each.message}"
                    warned = text, each.category, each.filename, each.lineno
                    self._warned.setdefault(warned, False)


def _fetch(reference: Any) -> Any:
    """Return what lies in Ray's object store."""
    import ray  # noqa: PLC0415 - an extra

    return ray.get(reference)
