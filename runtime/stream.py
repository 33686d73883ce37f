"""Run a model segment by segment: what is alive between two of them, for every batch of feeds."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from iobs_onnx.errors import ModelError
from iobs_onnx.runtime.data.feeds import Feed
from iobs_onnx.runtime.padding import Padding
from iobs_onnx.runtime.session import PLAIN, on_cuda, run_errors, taken

if TYPE_CHECKING:
    import onnxruntime as ort

_ELEMENTS = {dtype.numpy(): dtype.value for dtype in PLAIN}
_TENSORS = frozenset(f"tensor({name})" for name in ("bool", "float16", "float", "double")) | {
    f"tensor({sign}int{bits})" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


@dataclass(frozen=True)
class Batch:
    """What was fetched of one batch.

    Attributes:
        values: name to value.
        mask: the feed's padding mask, True where a position counts; None without one.
        weight: how often each of its rows counts.
        padding: says which values the mask is for.
    """

    values: dict[str, torch.Tensor]
    mask: NDArray[np.bool_] | None = None
    weight: float = 1.0
    padding: Padding | None = None

    def counts(self, name: str) -> torch.Tensor | None:
        """Return the mask over a value's first axis, or first two; None where it is not for it."""
        if self.mask is None or self.padding is None:
            return None
        value = self.values[name]
        mask = self.padding.over(self.mask, name, value.shape)
        return None if mask is None else torch.from_numpy(mask).to(value.device)


class Store:
    """Holds arrays in memory up to a budget, and beyond it on disk.

    Args:
        folder: where arrays go that no longer fit; it must exist when the first one does not.
        budget: bytes held in memory.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self._folder = folder
        self._free = budget
        self._count = 0

    def put(self, array: NDArray[Any]) -> NDArray[Any] | Path:
        """Take an array; give it back to :meth:`get` and :meth:`drop` as what is returned."""
        if array.nbytes <= self._free:
            self._free -= array.nbytes
            return array
        self._count += 1
        path = self._folder / f"stream-{os.getpid()}-{self._count:08d}.npy"
        try:
            np.save(path, array, allow_pickle=False)
        except OSError as error:
            # Of a full disk NumPy says only how much was written.
            number = error.errno or errno.ENOSPC
            raise OSError(number, os.strerror(number), os.fspath(path)) from error
        return path

    def get(self, held: NDArray[Any] | Path) -> NDArray[Any]:
        """Return the array; one on disk is read anew each time."""
        return np.load(held, allow_pickle=False) if isinstance(held, Path) else held

    def drop(self, held: NDArray[Any] | Path) -> None:
        """Forget an array."""
        if isinstance(held, Path):
            held.unlink()
        else:
            self._free += held.nbytes


class Spool:
    """Feeds that are read to their end now, to be iterated once, later: their number is known.

    Args:
        feeds: one may come with a weight, as a pair.
        store: holds them.
    """

    def __init__(self, feeds: Iterable[Feed | tuple[Feed, float]], store: Store) -> None:
        self._store = store
        self._held = deque(
            ({name: store.put(array) for name, array in feed.items()}, weight)
            for feed, weight in map(weighed, feeds)
        )

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[tuple[Feed, float]]:
        while self._held:
            held, weight = self._held.popleft()
            yield {name: self._store.get(array) for name, array in held.items()}, weight
            for array in held.values():
                self._store.drop(array)


def weighed(item: Feed | tuple[Feed, float]) -> tuple[Feed, float]:
    """Return a feed and its weight, 1 where it comes without one."""
    return item if isinstance(item, tuple) else (item, 1.0)


class Stream:
    """The values that one model has computed so far and still needs, batch by batch.

    Args:
        feeds: read once, on the first run; one may come with a weight, as a pair.
        store: holds the values.
        padding: the input that marks padding with 0, and what it is for; None if there is none.
        base: the stream of another model that read the same feeds: values that this stream did
            not compute itself are that one's. `feeds` is then not read.
    """

    def __init__(
        self,
        feeds: Iterable[Feed | tuple[Feed, float]],
        store: Store,
        *,
        padding: Padding | None = None,
        base: Stream | None = None,
    ) -> None:
        self._feeds = None if base is not None else iter(feeds)
        self._store = store
        self._padding = padding
        self._base = base
        self._held: list[dict[str, NDArray[Any] | Path]] = []
        self._masks: list[NDArray[np.bool_] | None] = []
        self._weights: list[float] = []
        self._feed: Feed = {}  # of the batch that is read from the feeds now

    def over(self) -> Stream:
        """Return a stream of another model that reads the same feeds, with this as its base."""
        return Stream((), self._store, base=self)

    def __len__(self) -> int:
        return len(self._masks) if self._base is None else len(self._base)

    def holds(self, names: Iterable[str]) -> bool:
        """Whether any of the values was computed by this stream, not by its base."""
        return any(name in self._held[0] for name in names) if self._held else False

    def kinds(self, names: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Return the ONNX element type and the rank of held values, as the first batch has them."""
        if not len(self):
            return {}
        held = {name: self._find(0, name) for name in names}
        return {n: (_ELEMENTS[a.dtype], a.ndim) for n, a in held.items() if a is not None}

    def read(self, index: int, names: Iterable[str]) -> Feed:
        """Return held values of one batch.

        Raises:
            ModelError: one is not held.
        """
        found = {name: self._find(index, name) for name in names}
        if missing := [name for name, array in found.items() if array is None]:
            raise ModelError(f"activation {missing[0]!r} is neither fed nor computed")
        return {name: array for name, array in found.items() if array is not None}

    def run(
        self,
        session: ort.InferenceSession | None,
        *,
        fetch: Collection[str] = (),
        keep: Collection[str] = (),
        alive: Collection[str] = (),
        device: torch.device | str = "cpu",
    ) -> Iterator[Batch]:
        """Run a segment over all batches, and yield what is fetched of each, until the next.

        Args:
            session: of the segment; None where all that is fetched was computed before.
            fetch: outputs of the session, or values of this stream.
            keep: outputs of the session to hold for later segments.
            alive: values to hold on to; all others are dropped as the batches pass.
            device: where fetched values will be summed: on CUDA they stay there.

        Raises:
            ModelError: ONNX Runtime cannot run a batch, or a value cannot be held.
        """
        cuda = session is not None and torch.device(device).type == "cuda" and on_cuda(session)
        for index in self._indices(alive):
            made = {} if session is None else self._run(session, index, keep, cuda)
            for name in keep:
                self._own(index)[name] = self._store.put(_to_numpy(made[name], name))
            values = {
                name: from_dlpack(made[name]) if name in made else self._tensor(index, name)
                for name in fetch
            }
            yield Batch(values, *self._about(index))
            # Whoever still holds this batch must not keep its memory next to that of the next.
            values.clear()
            made.clear()
            self._forget(index, alive)

    def release(self, alive: Collection[str]) -> None:
        """Drop all values but those alive."""
        for index in range(len(self._held)):
            self._forget(index, alive)

    def _indices(self, alive: Collection[str]) -> Iterator[int]:
        if self._feeds is None:
            index = 0
            while index < len(self):  # of a base that may still read its feeds, one batch ahead
                yield index
                index += 1
            return
        for index, item in enumerate(self._feeds):
            feed, weight = weighed(item)
            self._weights.append(weight)
            mask = feed.get(self._padding.name) if self._padding else None
            self._masks.append(None if mask is None else mask != 0)
            self._feed = feed
            held = {name: array for name, array in feed.items() if name in alive}
            self._own(index).update({name: self._store.put(a) for name, a in held.items()})
            yield index
        self._feeds, self._feed = None, {}

    def _run(
        self, session: ort.InferenceSession, index: int, keep: Collection[str], cuda: bool
    ) -> dict[str, ort.OrtValue]:
        names = [arg.name for arg in session.get_outputs()]
        inputs = [arg.name for arg in session.get_inputs()]
        optional = [arg.name for arg in session.get_overridable_initializers()]
        found = {name: self._find(index, name) for name in (*inputs, *optional)}
        if missing := [name for name in inputs if found[name] is None]:
            raise ModelError(f"value {missing[0]!r} is needed, and neither fed nor computed")
        held = {name: array for name, array in found.items() if array is not None}
        binding = session.io_binding()
        with run_errors():
            for name, array in taken(session, held).items():
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
            for name in names:
                # ONNX Runtime copies to the host itself what is held or summed there.
                binding.bind_output(name, "cuda" if cuda and name not in keep else "cpu")
            session.run_with_iobinding(binding)
        # Each tensor made of these keeps its buffer alive, and nothing else does.
        return dict(zip(names, binding.get_outputs(), strict=True))

    def _own(self, index: int) -> dict[str, NDArray[Any] | Path]:
        while len(self._held) <= index:
            self._held.append({})
        return self._held[index]

    def _find(self, index: int, name: str) -> NDArray[Any] | None:
        if name in self._feed:
            return self._feed[name]
        if index < len(self._held) and name in self._held[index]:
            return self._store.get(self._held[index][name])
        return None if self._base is None else self._base._find(index, name)

    def _tensor(self, index: int, name: str) -> torch.Tensor:
        array = self.read(index, (name,))[name]
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def _about(self, index: int) -> tuple[NDArray[np.bool_] | None, float, Padding | None]:
        if self._base is not None:
            return self._base._about(index)
        return self._masks[index], self._weights[index], self._padding

    def _forget(self, index: int, alive: Collection[str]) -> None:
        if index < len(self._held):
            held = self._held[index]
            for name in [name for name in held if name not in alive]:
                self._store.drop(held.pop(name))


def _to_numpy(value: ort.OrtValue, name: str) -> NDArray[Any]:
    """Return a copy of its own: a view would keep all memory of its session alive."""
    if value.data_type() not in _TENSORS:
        raise ModelError(
            f"value {name!r} is a {value.data_type()}, which cannot be handed from one segment to "
            "the next: raise the memory budget and use sequential none"
        )
    array: NDArray[Any] = value.numpy()
    return array
