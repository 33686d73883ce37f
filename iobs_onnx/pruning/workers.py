"""Walks on Ray: shards live in actors, one a GPU, and sites are solved by whichever is free.

A lost worker is replaced by a fresh one, whose shards go from their feeds through the segments that
are solved. Only sums and solved weights move.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
import torch

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import IobsError, OptionError
from iobs_onnx.passes import Segment, pack
from iobs_onnx.pruning.cluster import PATIENCE, connect
from iobs_onnx.pruning.executor import Executor
from iobs_onnx.pruning.records import Run, SolvedSite
from iobs_onnx.pruning.shard import Item
from iobs_onnx.pruning.worker import FEWER, Plan, Worker
from iobs_onnx.runtime import Store, Sums
from iobs_onnx.runtime.data.samples import require
from iobs_onnx.site import Site, Tap
from iobs_onnx.solvers import Problem, Solver, Sparse
from iobs_onnx.solvers.cut import cut

_Given = TypeVar("_Given")
_Found = TypeVar("_Found")

logger = logging.getLogger(__name__)

# A worker that is lost as often in a row is lost for a reason.
_TRIES = 4


@dataclass(frozen=True)
class RayCrew:
    """Workers of a Ray cluster, or of one that is started on this machine.

    Attributes:
        ray: the module.
        workers: how many.
        gpus: of each.
        nodes: on how many machines.
    """

    ray: Any
    workers: int
    gpus: int
    nodes: int

    @classmethod
    @contextmanager
    def started(cls, config: PruneConfig) -> Iterator[RayCrew]:
        """Connect to Ray as the options say, and let go of it behind the block.

        Raises:
            DependencyError: Ray is not installed.
            OptionError: nothing answers at the address, or there is less than was asked for.
        """
        ray = require("ray", "ray", "--workers")
        connected = ray.is_initialized()  # the caller's own
        if not connected:
            connect(ray, config)
        try:
            yield cls.of(ray, config)
        finally:
            if not connected:
                ray.shutdown()

    @classmethod
    def of(cls, ray: Any, config: PruneConfig) -> RayCrew:
        """Return as many workers as the options ask for, of the cluster that Ray is connected to.

        Raises:
            OptionError: there are not so many.
        """
        resources, nodes = ray.cluster_resources(), len([n for n in ray.nodes() if n["Alive"]])
        on_cpu = config.device == config.provider == "cpu"
        gpus = 0 if on_cpu else int(resources.get("GPU", 0))
        workers = config.workers or gpus or nodes
        for have, what in ((gpus, "GPUs"), (int(resources.get("CPU", 0)), "CPUs")):
            if workers > have and (have or what == "CPUs"):
                cpu = ", or --device cpu --provider cpu" if what == "GPUs" else ""
                raise OptionError(
                    f"workers {workers}: the cluster has {have} {what}, one a worker; give at most "
                    f"that{cpu}"
                )
        return cls(ray, workers, min(1, gpus), nodes)

    @contextmanager
    def executor(
        self,
        run: Run,
        dense: ir.Model,
        sparse: ir.Model,
        shards: Sequence[Iterable[Item]],
        store: Store,
        *,
        differ: bool,
    ) -> Iterator[Executor]:
        """See :meth:`iobs_onnx.pruning.executor.Crew.executor`; `store` stays empty."""
        del store
        each = -(-self.workers // self.nodes)  # on one machine
        threads = torch.get_num_threads()
        plan = Plan(
            replace(run.config, metric=None, min_metric=None),
            pack([dense, sparse]),
            differ,
            run.engine.host_budget // each,
            threads if "OMP_NUM_THREADS" in os.environ else max(1, threads // each),
            logging.getLogger("iobs_onnx").getEffectiveLevel(),
        )
        executor = RayExecutor(self, run, plan, [list(feeds) for feeds in shards])
        try:
            executor.begin()
            yield executor
        finally:
            executor.end()


@dataclass(frozen=True)
class _Call:
    """A call of a worker that is under way."""

    index: int
    worker: Any
    method: str
    arguments: tuple[Any, ...]
    result: Any


class RayExecutor:
    """Runs shards in workers, as many bytes in each, and solve tasks in any that is free.

    Args:
        crew: whose workers they are.
        run: what all of the run shares.
        plan: for the workers.
        shards: the feeds of each.
    """

    def __init__(
        self, crew: RayCrew, run: Run, plan: Plan, shards: Sequence[Sequence[Item]]
    ) -> None:
        self._ray, self._run, self._count = crew.ray, run, crew.workers
        self._kind = crew.ray.remote(
            num_cpus=1, num_gpus=crew.gpus, scheduling_strategy="SPREAD", max_restarts=0
        )(Worker)
        self._plan = crew.ray.put(plan)
        self._feeds = [crew.ray.put(feeds) for feeds in shards]
        self._home = dealt_evenly([_size(feeds) for feeds in shards], crew.workers)
        self._firsts = [0, *accumulate(len(feeds) for feeds in shards)]
        # What a fresh worker has to go through: the segments that are solved, and of the one that
        # is measured the shards whose sums are here.
        self._done: list[tuple[Segment, Any]] = []
        self._current: Segment | None = None
        self._summed: set[int] = set()
        self._workers = [self._kind.remote() for _ in range(self._count)]
        self._folders: dict[int, tuple[str, Path]] = {}  # that a killed worker leaves, and where
        self._free: SimpleQueue[int] = SimpleQueue()
        for index in range(self._count):
            self._free.put(index)

    def begin(self) -> None:
        """Let every worker load the models and take its feeds."""
        for call in [self._open(index) for index in range(self._count)]:
            self._folders[call.index] = self._result(call)

    @property
    def tasks(self) -> RayExecutor:
        """The workers, too."""
        return self

    def end(self) -> None:
        """Let the workers go, at once where they do not answer."""
        calls = [self._call(index, "close") for index in range(self._count)]
        for call in calls:
            with suppress(Exception):
                self._ray.get(call.result, timeout=PATIENCE).retell()
            self._end(call.index)

    def measure(
        self,
        segment: Segment,
        taps: Sequence[Tap],
        beside: Collection[tuple[Tap, Tap]],
        advance: Callable[[], None],
    ) -> Sums:
        """See :meth:`Executor.measure`; a worker is at most two shards ahead of what is added."""
        self._current, self._summed = segment, set()
        numbers, calls = iter(range(len(self._feeds))), deque[tuple[int, _Call]]()

        def more() -> None:
            for number in islice(numbers, 1):
                wanted = number, segment, tuple(taps), tuple(beside), self._firsts[number]
                calls.append((number, self._call(self._home[number], "measure", *wanted)))

        for _ in range(2 * self._count):
            more()
        total: Sums | None = None
        while calls:
            number, call = calls.popleft()
            sums: Sums = self._result(call)
            self._summed.add(number)
            more()
            for _ in range(sums.batches):
                advance()
            if total is None:
                total = sums
                total.move(self._run.device)
            else:
                total.merge(sums)
        assert total is not None, "there is at least one shard"
        return total

    def propagate(self, segment: Segment, solved: Mapping[Site, SolvedSite]) -> None:
        """See :meth:`Executor.propagate`."""
        weights = self._ray.put({site: _in_memory(item) for site, item in solved.items()})
        self._done.append((segment, weights))
        self._current, self._summed = None, set()
        every = range(self._count)
        for call in [self._call(index, "propagate", segment, weights) for index in every]:
            # A worker that took its place has been through this segment.
            found = self._result(call, again=False)
            if found is not None:
                provider, used, told = found
                told.retell()
                self._run.engine.note(segment, provider, used)

    def each(
        self, function: Callable[[_Given], _Found], items: Iterable[_Given]
    ) -> Iterator[_Found]:
        """Call a function of every item, as many at a time as there are workers."""
        with ThreadPoolExecutor(self._count) as pool:
            yield from pool.map(function, items)

    def solve(self, solver: Solver, problem: Problem) -> Sparse:
        """Solve a problem in as many parts as there are workers, each on one that is free."""
        host = problem.on(torch.device("cpu"))
        hessian = self._ray.put(host.hessian)

        def solved(part: Problem) -> Sparse:
            index = self._free.get()
            try:
                bare = replace(part, hessian=torch.empty(0))
                found: Sparse = self._result(self._call(index, "solve", solver, bare, hessian))
            finally:
                self._free.put(index)
            return found

        found = self.each(solved, cut(host, solver, self._count))
        device = problem.weight.device
        return Sparse(*(torch.cat(parts).to(device) for parts in zip(*found, strict=True)))

    def _call(self, index: int, method: str, *arguments: Any) -> _Call:
        worker = self._workers[index]
        result = getattr(worker, method).remote(*arguments)
        return _Call(index, worker, method, arguments, result)

    def _result(self, call: _Call, *, again: bool = True) -> Any:
        """Return what a call returns; where its worker is lost, another takes its place.

        Args:
            call: of a worker.
            again: whether the one that takes its place is called again; else None is returned.

        Raises:
            IobsError: what the worker raised, or workers are lost again and again.
        """
        for _ in range(_TRIES):
            # Another call of a lost worker may have been here before: what that one returned is
            # behind what the worker in its place has seen.
            if self._workers[call.index] is call.worker:
                with suppress(*self._losses):
                    return self._get(call.result)
                self._replace(call.index)
            if not again:
                return None
            call = self._call(call.index, call.method, *call.arguments)
        raise self._lost()

    def _replace(self, index: int) -> None:
        """Put a fresh worker in the place of a lost one, and bring it where that was."""
        own = [number for number in self._summed if self._home[number] == index]
        for _ in range(_TRIES):
            logger.warning("worker %d is lost: another takes its place", index)
            self._end(index)  # it may live, and only be out of reach
            self._workers[index] = self._kind.remote()
            steps = [self._open(index), self._call(index, "replay", self._done)]
            if (now := self._current) is not None:
                steps += [self._call(index, "measure", number, now, (), ()) for number in own]
            with suppress(*self._losses):
                self._folders[index] = self._get(steps[0].result)
                for step in steps[1:]:
                    self._get(step.result)
                return
        raise self._lost()

    def _end(self, index: int) -> None:
        """End a worker, and remove what it left on this machine."""
        self._ray.kill(self._workers[index])
        node, folder = self._folders.pop(index, ("", None))
        if folder is not None and node == socket.gethostname():
            shutil.rmtree(folder, ignore_errors=True)

    def _open(self, index: int) -> _Call:
        feeds = {n: feed for n, feed in enumerate(self._feeds) if self._home[n] == index}
        return self._call(index, "open", self._plan, feeds)

    def _get(self, reference: Any) -> Any:
        """Return a result; an error of ours is raised as the worker raised it."""
        faults = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except faults.RayTaskError as error:
            if isinstance(error.cause, IobsError):
                raise error.cause from None
            raise
        except faults.OutOfMemoryError as error:  # Ray ends workers before the system does
            node = re.search(r"IP: ([^\s,)]+)", str(error))
            where = f"worker on {node[1]}" if node else "worker"
            raise OptionError(f"{where}: out of memory; {FEWER}") from error

    @property
    def _losses(self) -> tuple[type[Exception], ...]:
        """What Ray raises where a worker is gone, or what it had returned."""
        faults = self._ray.exceptions
        return faults.RayActorError, faults.ObjectLostError

    def _lost(self) -> IobsError:
        return IobsError(
            f"workers were lost {_TRIES} times in a row; is their memory enough? {FEWER}"
        )


def dealt_evenly(sizes: Sequence[int], workers: int) -> list[int]:
    """Return the worker of each shard: the largest goes first, to whichever has least by then."""
    loads, homes = [0] * workers, [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        homes[number] = loads.index(min(loads))
        loads[homes[number]] += sizes[number]
    return homes


def _size(items: Sequence[Item]) -> int:
    """Return how many bytes the feeds of a shard hold."""
    feeds = (item[0] if isinstance(item, tuple) else item for item in items)
    return sum(array.nbytes for feed in feeds for array in feed.values())


def _in_memory(item: SolvedSite) -> SolvedSite:
    """Return a solved site as it can be sent, without the integers that it is written as."""
    tensors = (
        None if tensor is None else ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype)
        for tensor in (item.weight, item.bias)
    )
    weight, bias = tensors
    assert weight is not None, "every solved site has a weight"
    return replace(item, weight=weight, bias=bias, codes=None)
