"""What is done to a segment once it is measured, and to the model once it is walked.

A stage proposes, and says what its proposal is worth on data that it was not made from. Whether it
is taken, that it is kept on disk, and how far it is are the affair of the walk
(:mod:`iobs_onnx.pruning.walk`) and of :mod:`iobs_onnx.pruning.finish`: each is handled there, once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.hessian import Cross, Hessian
from iobs_onnx.passes import Segment, Slot, Surroundings
from iobs_onnx.pruning.judge import Verdict
from iobs_onnx.pruning.progress import Advance
from iobs_onnx.pruning.records import Run, SolvedSite
from iobs_onnx.site import Site, Tap
from iobs_onnx.solvers import Problem, Solver, Sparse

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


class Tasks(Protocol):
    """Where what a stage has to compute is computed."""

    def each(self, function: Callable[[_Item], _Found], items: Iterable[_Item]) -> Iterator[_Found]:
        """Call a function of every item, maybe of several at a time; yield results in order."""

    def solve(self, solver: Solver, problem: Problem) -> Sparse:
        """Solve a problem, to the same bits wherever that is."""


class Here:
    """This process, one after the other."""

    def each(self, function: Callable[[_Item], _Found], items: Iterable[_Item]) -> Iterator[_Found]:
        """See :meth:`Tasks.each`."""
        return map(function, items)

    def solve(self, solver: Solver, problem: Problem) -> Sparse:
        """See :meth:`Tasks.solve`."""
        return solver.solve(problem)


@dataclass(frozen=True)
class Work:
    """A segment that is measured, as a stage finds it.

    Attributes:
        run: what all of the run shares.
        segment: of the graph.
        hessians: of the segment's taps; one in a body that never ran is missing.
        residuals: for a tap and the stream beside it; missing where their rows do not fit.
        surroundings: the biases that may be moved, of every site.
        stored: the tensors of the dense model, by name.
        start: what the stages before, or else the rounds before, made of sites; those that are
            missing are dense.
        tasks: where to solve.
    """

    run: Run
    segment: Segment
    hessians: Mapping[Tap, Hessian]
    residuals: Mapping[tuple[Tap, Tap], Cross]
    surroundings: Mapping[Site, Surroundings]
    stored: Mapping[str, Slot]
    start: Mapping[Site, SolvedSite]
    tasks: Tasks


@dataclass(frozen=True)
class Proposal:
    """What a stage would make of sites.

    Attributes:
        sites: as they would be; those that are missing stay as they are.
        before, after: held-out error without and with it; None where there is nothing to choose,
            as the first stage has to make sites sparse.
    """

    sites: Mapping[Site, SolvedSite]
    before: float | None = None
    after: float | None = None

    @property
    def accepted(self) -> bool:
        """Whether it is taken: the held-out error falls, or there is nothing to choose."""
        return self.before is None or (self.after is not None and self.after < self.before)


class SegmentStage(Protocol):
    """Something done to every segment of a walk, after it is measured and before the next."""

    @property
    def name(self) -> str:
        """Of its records on disk, and of its seconds in the report."""

    def run(self, work: Work, advance: Callable[[], None]) -> Proposal:
        """Propose what becomes of the segment's sites.

        Args:
            work: the segment.
            advance: to be called once for each of its sites.

        Raises:
            IobsError: with the name of the site.
        """


@dataclass(frozen=True)
class Pruned:
    """A model as pruned so far.

    Attributes:
        sites: what became of those that are sparse.
        verdict: what the model with them is worth.
        tensors: other stored tensors that changed, by name.
        told: what stages of the whole model have to tell, by their names.
    """

    sites: Mapping[Site, SolvedSite]
    verdict: Verdict
    tensors: Mapping[str, ir.TensorProtocol] = field(default_factory=dict)
    told: Mapping[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelProposal:
    """What a stage would make of the whole model.

    Attributes:
        sites: those that stay sparse.
        tensors: stored tensors to exchange, weights of sites among them, by name.
        before, after: held-out error without and with it; None where there is nothing to choose.
        verdict: what that model is worth, where the stage knows.
        told: what the report tells of it, as JSON types; `accepted` and `notes` may be changed.
    """

    sites: Collection[Site]
    tensors: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    before: float | None = None
    after: float | None = None
    verdict: Verdict | None = None
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def accepted(self) -> bool:
        """Whether it is taken: the held-out error falls, or there is nothing to choose."""
        return self.before is None or (self.after is not None and self.after < self.before)


class ModelStage(Protocol):
    """Something done to the whole model after the last round.

    :mod:`iobs_onnx.pruning.finish` decides whether its proposal is taken.
    """

    @property
    def name(self) -> str:
        """Of its records on disk, and of its progress."""

    def steps(self, run: Run) -> int | None:
        """Return how often it calls `advance`; None where that is unknown."""

    def run(self, run: Run, pruned: Pruned, advance: Advance) -> ModelProposal:
        """Propose what becomes of the model."""
