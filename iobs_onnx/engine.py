"""Run models segment by segment: the meeting place of `passes` (which cut) and `runtime`."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from iobs_onnx.errors import DataError, DependencyError, ModelError, OptionError
from iobs_onnx.passes import Segment, instrument, outputs_out_of_reach, partition, release, widen
from iobs_onnx.runtime import (
    Feed,
    Fidelity,
    OutputFidelity,
    Padding,
    Store,
    Stream,
    find_padding,
    open_session,
    run_errors,
    session_info,
    settle_provider,
    share_of,
    taken,
)

_CPU = torch.device("cpu")
# Of the machine's memory: a segment's weights and Hessians, and again as much for activations.
_SHARE = 4
# Parameters of `mallopt`.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def default_memory_budget() -> int:
    """Return a quarter of the machine's memory, in bytes."""
    return _all_memory() // _SHARE


def available_memory() -> int:
    """Return how much memory a process can still take, in bytes; all there is where unknown."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    return _all_memory()


def _all_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def give_back() -> None:
    """Return freed memory to the system, and that of a GPU which torch keeps.

    The C library of Linux keeps what lies between blocks in use, after a segment as much again as
    the segment took. Elsewhere there is nothing to do.
    """
    if (library := _allocator()) is not None:
        library.malloc_trim(0)
    torch.cuda.empty_cache()  # does nothing where CUDA was not used


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory in the process, for work that frees and takes the same again and again.

    The C library of Linux maps every large block anew, and the system fills it with zeros: a third
    of the time of a step of training. Elsewhere there is nothing to do.
    """
    library = _allocator()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, 65536)  # the defaults
        library.mallopt(_TRIM_THRESHOLD, 128 << 10)
        library.malloc_trim(0)


@contextmanager
def memory_faults(where: str, remedy: str) -> Iterator[None]:
    """Say in one line that memory is full, that of a device or of the machine.

    Args:
        where: whose memory, at the beginning of the line.
        remedy: its end.

    Raises:
        OptionError: it is full.
    """
    told = f"{where}: out of memory; {remedy}"
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OptionError(told) from error
    except RuntimeError as error:
        if "not enough memory" not in str(error):  # what torch says on a CPU
            raise
        raise OptionError(told) from error


def _allocator() -> ctypes.CDLL | None:
    """Return the C library where it is glibc."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None


class Engine:
    """Opens parts of models, and remembers where they ran.

    Args:
        provider: of ONNX Runtime.
        budget: bytes of weights and Hessians in a segment, and of activations between two.
        folder: for activations beyond the budget.
        threads: of ONNX Runtime; 0 for one a core.
        device: of torch; ONNX Runtime takes the same GPU. No segment is larger than a quarter of
            its memory, and another quarter is for activations.
    """

    def __init__(
        self,
        provider: Literal["auto", "cpu", "cuda"],
        budget: int,
        folder: Path,
        threads: int = 0,
        device: torch.device = _CPU,
    ) -> None:
        self.provider = provider
        self.device = device
        self.host_budget = budget
        self.budget = budget if device == _CPU else min(budget, share_of(device))
        self.folder = folder
        self._threads = threads
        self._used: dict[str, object] = {}
        self._ran: dict[Hashable, str] = {}
        self._paddings: dict[int, tuple[ir.Model, Padding | None]] = {}

    def used(self) -> dict[str, object]:
        """Return the version of ONNX Runtime and the providers in use, once a part was opened.

        Where float16 or bfloat16 was computed in another type, that stands there too.
        """
        return dict(self._used)

    def ran(self, segment: Segment) -> str | None:
        """Return the execution provider that ran a segment; None where nothing had to be run."""
        return self._ran.get(_key(segment))

    def note(self, segment: Segment, provider: str | None, used: Mapping[str, object]) -> None:
        """Remember what this or another engine used, and where it ran a segment.

        Raises:
            DependencyError: one ran it on CUDA, and another on the CPU.
        """
        self._used.update(used)
        if provider is None:
            return
        before = self._ran.setdefault(_key(segment), provider)
        if before != provider:
            raise DependencyError(
                f"{_named(segment)} ran on the {before}, and elsewhere on the {provider}; say "
                "which with --provider cpu or cuda"
            )

    @cached_property
    def _on(self) -> Literal["cpu", "cuda"]:
        """Where every part is run: what works when the first one is."""
        return settle_provider(self.provider, self.device.index or 0)

    def store(self) -> Store:
        """Return a store for the activations of one process.

        Where torch and ONNX Runtime compute on one GPU, a quarter of its memory holds the first.
        """
        if self.device == _CPU or self._on == "cpu":
            return Store(self.folder, self.host_budget)
        return Store(self.folder, self.host_budget, self.device, share_of(self.device))

    def stream(
        self,
        model: ir.Model,
        feeds: Iterable[Feed | tuple[Feed, float]],
        *,
        mask_padding: bool = True,
        store: Store | None = None,
    ) -> Stream:
        """Return a stream of the model's inputs; `store` holds its values, a new one if None."""
        if id(model) not in self._paddings:  # models are compared again and again
            self._paddings[id(model)] = model, find_padding(model)
        padding = self._paddings[id(model)][1] if mask_padding else None
        return Stream(feeds, store or self.store(), padding=padding)

    def open(self, model: ir.Model, segment: Segment, names: Sequence[str], stream: Stream) -> Any:
        """Open the part of a model that computes `names` in a segment; None if there is none.

        Raises:
            DependencyError: other parts run on CUDA, and this one cannot.
        """
        made = [name for name in dict.fromkeys(names) if name not in segment.inputs]
        if not made:
            return None
        given = stream.kinds(segment.inputs)
        part = instrument(model, made, given)
        if self._on == "cpu":
            self._used |= dict.fromkeys(widen(part), "computed in float32")
        try:
            session = self._session(part, self._threads)
        except DependencyError as error:
            raise DependencyError(
                f"{_named(segment)} falls to the CPU, where others run on CUDA: {error}, or a "
                "smaller --memory-budget"
            ) from error
        self.note(segment, session.get_providers()[0], session_info(session))
        return session

    def _session(self, part: ir.Model, threads: int = 0) -> Any:
        return open_session(part, self._on, threads=threads, gpu=self.device.index or 0)

    def whole(
        self, model: ir.Model, names: Sequence[str], feed: Feed
    ) -> dict[str, NDArray[Any]] | None:
        """Run a model at once on one feed, as ONNX Runtime runs its file, and return values of it.

        Only bfloat16, which a CPU does not run, is computed in float32.

        Returns:
            None where the model's tensors exceed the budget.

        Raises:
            ModelError: ONNX Runtime cannot run it.
        """
        part = instrument(model, names)
        widened = part.clone()
        if "bfloat16" in widen(widened):
            part = widened
        stored = (value.const_value for value in part.graph.initializers.values())
        if sum(tensor.nbytes for tensor in stored if tensor is not None) > self.budget:
            return None
        session = self._session(part)
        with run_errors():
            found = session.run(None, taken(session, feed))
        outputs = [output.name for output in session.get_outputs()]
        return dict(zip(outputs, found, strict=True))


def _key(segment: Segment) -> Hashable:
    """Return what tells a segment from the others of any walk, in any process."""
    return segment.inputs, segment.outputs, segment.wanted, segment.taps


def _named(segment: Segment) -> str:
    """Say which segment it is."""
    made = [*(site.name for site in segment.sites), *segment.wanted, *segment.outputs]
    more = f" and {len(segment.sites) - 1} more" if len(segment.sites) > 1 else ""
    return f"the segment of {made[0]!r}{more}" if made else "a segment"


def _require_shapes(dense: ir.Model, sparse: ir.Model) -> None:
    """Raise ModelError where an output cannot have the shape that it has in the other model."""
    shapes = {value.name: value.shape for value in sparse.graph.outputs}
    for value in dense.graph.outputs:
        ours, theirs = value.shape, shapes.get(value.name)
        if ours is None or theirs is None:
            continue
        pairs = zip(ours, theirs, strict=False)
        fixed = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
        if fixed or len(ours) != len(theirs):
            raise ModelError(
                f"output {value.name!r} has shape {ours} in the dense model, {theirs} in the "
                "sparse one; give the model that it was made from"
            )


def compare(
    dense: ir.Model, sparse: ir.Model, feeds: Iterable[Feed], engine: Engine
) -> list[OutputFidelity]:
    """Run both models, whose graphs are the same, and compare every float output.

    Outputs that need an operator unknown to ONNX Runtime are left out.

    Raises:
        DataError: there is no feed.
        ModelError: a model cannot be run, or the sparse one lacks a value of the dense one or
            declares it in a shape that cannot be the same.
    """
    _require_shapes(dense, sparse)
    unknown = outputs_out_of_reach(dense)
    names = [value.name or "" for value in dense.graph.outputs if value.name not in unknown]
    fidelity = Fidelity()
    first, feeds = _first(feeds)
    ours = engine.stream(dense, feeds)
    theirs = ours.over()
    # Two models are in memory at once.
    for segment in partition(dense, outputs=names, budget=engine.budget // 2):
        made = (*segment.wanted, *segment.outputs)
        expected = engine.open(dense, segment, made, ours)
        found = engine.open(sparse, segment, made, theirs)
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
    found = fidelity.result()
    # What was computed in float32 does not show what float16 cannot hold.
    rounded = engine.whole(sparse, names, first) if "float16" in engine.used() else None
    return found if rounded is None else [_as_rounded(output, rounded) for output in found]


def _first(feeds: Iterable[Feed]) -> tuple[Feed, Iterable[Feed]]:
    """Return the first feed, empty where there is none, and all of them."""
    rest = iter(feeds)
    first = list(islice(rest, 1))
    return (first or [{}])[0], chain(first, rest)


def _as_rounded(output: OutputFidelity, values: dict[str, NDArray[Any]]) -> OutputFidelity:
    """Mark an output that is not finite where the whole model runs in float16."""
    if not output.finite or np.isfinite(values[output.name]).all():
        return output
    note = "float16 cannot hold what the whole model computes; float32 can"
    return replace(output, finite=False, note=note)
