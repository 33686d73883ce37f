"""What runs in a worker process: shards of the feeds, and solve tasks."""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

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

# What to do where the memory of a worker is full.
FEWER = "use fewer --workers, or a smaller --memory-budget"


@dataclass(frozen=True)
class Plan:
    """What every worker of a walk is told.

    Attributes:
        config: the options.
        models: the dense one, and the one as pruned so far, with every value that taps read.
        differ: whether they differ before any site of this walk is solved.
        budget: bytes of activations that a worker holds in memory.
        threads: of each worker.
    """

    config: PruneConfig
    models: Shipment
    differ: bool
    budget: int
    threads: int


class Worker:
    """Some shards of one walk, in a process of their own.

    Errors that it raises name its node. Whoever calls it may lose it: what it holds can be made
    again from the feeds and the solved segments, by :meth:`replay`.
    """

    def __init__(self) -> None:
        self._held = ExitStack()

    def open(self, plan: Plan, feeds: Mapping[int, Any]) -> None:
        """Load the models; fetch the feeds of shards, by their numbers."""
        with _named():
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

    def close(self) -> None:
        """Leave nothing on disk."""
        self._held.close()

    def measure(
        self,
        number: int,
        segment: Segment,
        taps: Sequence[Tap],
        beside: Collection[tuple[Tap, Tap]],
        first: int = 0,
    ) -> Sums:
        """Return the sums over one shard, in host memory; see :meth:`Shard.measure`."""
        with _named():
            sums = self._shards[number].measure(segment, taps, beside, first=first)
            sums.move(torch.device("cpu"))
            return sums

    def propagate(
        self, segment: Segment, solved: Mapping[Site, SolvedSite]
    ) -> tuple[str | None, dict[str, object]]:
        """Run a segment with its new weights over all shards, and forget it.

        Returns:
            The execution provider that ran it, and what was used otherwise.
        """
        with _named():
            self._models.close()
            self._models.rewrite(solved)
            for shard in self._shards.values():
                shard.propagate(segment)
            self._models.forget(segment)
            engine = self._models.place.engine
            return engine.ran(segment), engine.used()

    def replay(self, done: Sequence[tuple[Segment, Any]]) -> None:
        """Bring fresh shards behind solved segments.

        Args:
            done: segments, and references to their solved sites.
        """
        for segment, solved in done:
            for number in self._shards:
                self.measure(number, segment, (), ())
            self.propagate(segment, _fetch(solved))

    def solve(self, solver: Solver, problem: Problem, hessian: torch.Tensor) -> Sparse:
        """Solve a problem, which comes without its Hessian, on this worker's device."""
        with _named(), exact_float32():
            whole = replace(problem, hessian=hessian).on(self._models.place.device)
            found = solver.solve(whole)
            return Sparse(found.weight.cpu(), found.mask.cpu())


def _fetch(reference: Any) -> Any:
    """Return what lies in Ray's object store."""
    import ray  # noqa: PLC0415 - an extra

    return ray.get(reference)


@contextmanager
def _named() -> Iterator[None]:
    """Let errors name the node, and say what to do where its memory is full."""
    node = f"worker on {socket.gethostname()}"
    with memory_faults(node, FEWER):
        try:
            yield
        except NotFinite as error:
            raise NotFinite(f"{node}: {error}", error.value, error.batch) from error
        except IobsError as error:
            raise type(error)(f"{node}: {error}") from error
