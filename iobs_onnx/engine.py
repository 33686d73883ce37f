"""Run models segment by segment: the meeting place of `passes` (which cut) and `runtime`."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch

from iobs_onnx.errors import DataError
from iobs_onnx.hessian import Hessian
from iobs_onnx.memory import give_back
from iobs_onnx.passes import Segment, instrument, outputs_out_of_reach, partition, release, widen
from iobs_onnx.runtime import (
    Feed,
    Fidelity,
    OutputFidelity,
    Store,
    Stream,
    available_providers,
    calibrate,
    default_pad_mask,
    input_specs,
    open_session,
    session_info,
)
from iobs_onnx.site import Site, Tap

# Of the machine's memory: a segment's weights and Hessians, and again as much for activations.
_SHARE = 4


def default_memory_budget() -> int:
    """Return a quarter of the machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _SHARE


@dataclass(frozen=True)
class Place:
    """Where segments run and what they may use.

    Attributes:
        provider: of ONNX Runtime.
        budget: bytes of weights and Hessians in a segment, and of activations between two.
        folder: for activations beyond the budget.
        runtime: version of ONNX Runtime and providers in use, once a session was opened, and
            what became of bfloat16 where there is none.
    """

    provider: Literal["auto", "cpu", "cuda"]
    budget: int
    folder: Path
    runtime: dict[str, object] = field(default_factory=dict)

    def stream(
        self,
        model: ir.Model,
        feeds: Iterable[Feed | tuple[Feed, float]],
        *,
        mask_padding: bool = True,
    ) -> Stream:
        """Return a stream of the model's inputs; its store is the only one for these feeds."""
        pad_mask = default_pad_mask(input_specs(model)) if mask_padding else None
        return Stream(feeds, Store(self.folder, self.budget), pad_mask=pad_mask)

    def session(
        self, model: ir.Model, segment: Segment, names: Iterable[str], stream: Stream
    ) -> Any:
        """Open the part of a model that computes `names` in a segment; None if there is none."""
        made = [name for name in dict.fromkeys(names) if name not in segment.inputs]
        if not made:
            return None
        given = stream.kinds(segment.inputs)
        part = instrument(model, made, given)
        on_cpu = self.provider == "cpu" or "CUDAExecutionProvider" not in available_providers()
        if on_cpu and widen(part):  # the CPU has no kernels for bfloat16
            self.runtime["bfloat16"] = "computed in float32"
        session = open_session(part, self.provider)
        self.runtime.update(session_info(session))
        return session


def measure_once(
    model: ir.Model,
    sites: Sequence[Site],
    feeds: Iterable[Feed],
    place: Place,
    device: torch.device,
    *,
    mask_padding: bool,
) -> Iterator[tuple[Segment, dict[Tap, Hessian]]]:
    """Run a model as it is, and yield after each segment what was measured so far.

    Args:
        model: from :func:`iobs_onnx.passes.taps.expose`.
        sites: whose taps are measured.
        feeds: read once.
        place: where the segments run.
        device: where Hessians are summed.
        mask_padding: leave padding out.

    Yields:
        The segment, and the Hessians; the caller deletes those that it needs no more.
    """
    stream = place.stream(model, feeds, mask_padding=mask_padding)
    hessians: dict[Tap, Hessian] = {}
    for segment in partition(model, sites, budget=place.budget):
        fetch = tuple(dict.fromkeys(tap.value for tap in segment.taps))
        session = place.session(model, segment, (*fetch, *segment.outputs), stream)
        batches = stream.run(
            session, fetch=fetch, keep=segment.outputs, alive=segment.alive, device=device
        )
        hessians |= calibrate(segment.taps, batches, device=device).hessians
        stream.release(segment.alive)
        yield segment, hessians
        release(model, segment.weights)


def keep_only(hessians: dict[Tap, Hessian], taps: Collection[Tap]) -> None:
    """Delete the Hessians of all other taps."""
    for tap in [tap for tap in hessians if tap not in taps]:
        del hessians[tap]


def compare(
    dense: ir.Model, sparse: ir.Model, feeds: Iterable[Feed], place: Place
) -> list[OutputFidelity]:
    """Run both models, whose graphs are the same, and compare every float output.

    Outputs that need an operator unknown to ONNX Runtime are left out.

    Raises:
        DataError: there is no feed.
        ModelError: a model cannot be run, or the sparse one lacks a value of the dense one.
    """
    unknown = outputs_out_of_reach(dense)
    names = [value.name or "" for value in dense.graph.outputs if value.name not in unknown]
    fidelity = Fidelity()
    ours = place.stream(dense, feeds)
    theirs = ours.over()
    # Two models are in memory at once.
    for segment in partition(dense, outputs=names, budget=place.budget // 2):
        expected = place.session(dense, segment, (*segment.wanted, *segment.outputs), ours)
        found = place.session(sparse, segment, (*segment.wanted, *segment.outputs), theirs)
        pairs = zip(
            ours.run(expected, fetch=segment.wanted, keep=segment.outputs, alive=segment.alive),
            theirs.run(found, fetch=segment.wanted, keep=segment.outputs, alive=segment.alive),
            strict=True,
        )
        for reference, batch in pairs:
            fidelity.add(reference, batch)
        del expected, found
        release(dense, segment.weights)
        release(sparse, segment.weights)
        give_back()
    if not len(ours):
        raise DataError("verification data: there are no feeds to run the model on")
    return fidelity.result()
