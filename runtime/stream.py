"""Run a model segment by segment: what is alive between two of them, for every batch of feeds."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from iobs_onnx.errors import ModelError
from iobs_onnx.runtime.data.feeds import Feed
from iobs_onnx.runtime.device import wait_for
from iobs_onnx.runtime.padding import Padding
from iobs_onnx.runtime.session import on_cuda, run_errors, taken
from iobs_onnx.runtime.store import (
    TENSORS,
    Held,
    Store,
    Value,
    as_tensor,
    bind,
    element,
    on_host,
    value_of,
)

if TYPE_CHECKING:
    import onnxruntime as ort


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
        """Return the mask over a value's first axis, or first two; None where it is not for it.

        It stays on the host: a GPU that is told how many rows there are need not be waited for.
        """
        if self.mask is None or self.padding is None:
            return None
        value = self.values[name]
        mask = self.padding.over(self.mask, name, value.shape)
        return None if mask is None else torch.from_numpy(mask)


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
            yield {name: on_host(self._store.get(each)) for name, each in held.items()}, weight
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
        self._held: list[dict[str, Held]] = []
        self._masks: list[NDArray[np.bool_] | None] = []
        self._weights: list[float] = []
        self._feed: Feed = {}  # of the batch that is read from the feeds now
        self._lifted: tuple[int, dict[str, Value]] = -1, {}  # of one batch, copied to the device

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
        return {n: (element(v), v.ndim) for n, v in held.items() if v is not None}

    def read(self, index: int, names: Iterable[str]) -> Feed:
        """Return held values of one batch.

        Raises:
            ModelError: one is not held.
        """
        found = {name: self._find(index, name) for name in names}
        if missing := [name for name, array in found.items() if array is None]:
            raise _missing(missing[0])
        return {name: on_host(value) for name, value in found.items() if value is not None}

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

        Where the store has a device and the session runs there, values go in and come out there:
        one that is on the host is copied once for each batch, for both models together.

        Args:
            session: of the segment; None where all that is fetched was computed before.
            fetch: outputs of the session, or values of this stream.
            keep: outputs of the session to hold for later segments.
            alive: values to hold on to; all others are dropped as the batches pass.
            device: where fetched values are wanted.

        Raises:
            ModelError: ONNX Runtime cannot run a batch, or a value cannot be held.
        """
        device = torch.device(device)
        for index in self._indices(alive):
            made = {} if session is None else self._run(session, index, keep, device)
            for name in keep:
                self._own(index)[name] = self._store.put(value_of(made[name], name))
            values = {
                name: from_dlpack(made[name]).to(device)
                if name in made
                else self._tensor(index, name, device)
                for name in fetch
            }
            yield Batch(values, *self._about(index))
            # Whoever still holds this batch must not keep its memory next to that of the next.
            values.clear()
            made.clear()
            self._forget(index, alive)
        self._let_go()

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
            for name in [name for name in feed if name in alive]:
                self._own(index)[name] = self._store.put(self._fed(index, name))
            yield index
        self._feeds, self._feed = None, {}

    def _run(
        self, session: ort.InferenceSession, index: int, keep: Collection[str], wanted: torch.device
    ) -> dict[str, ort.OrtValue]:
        outputs = session.get_outputs()
        inputs = [arg.name for arg in session.get_inputs()]
        optional = [arg.name for arg in session.get_overridable_initializers()]
        device = self._store.device if on_cuda(session) else None
        found = {
            name: self._at(index, name, device or torch.device("cpu"))
            for name in (*inputs, *optional)
        }
        if missing := [name for name in inputs if found[name] is None]:
            raise ModelError(f"value {missing[0]!r} is needed, and neither fed nor computed")
        held = {name: value for name, value in found.items() if value is not None}
        binding = session.io_binding()
        with run_errors():
            for name, value in taken(session, held).items():
                bind(binding, name, value)
            for arg in outputs:
                there = arg.name in keep or wanted.type == "cuda"
                stays = device is not None and there and arg.type in TENSORS
                place = ("cuda", device.index) if device is not None and stays else ("cpu", 0)
                binding.bind_output(arg.name, *place)
            wait_for(device)
            session.run_with_iobinding(binding)
        # Each tensor made of these keeps its buffer alive, and nothing else does.
        names = [arg.name for arg in outputs]
        return dict(zip(names, binding.get_outputs(), strict=True))

    def _own(self, index: int) -> dict[str, Held]:
        while len(self._held) <= index:
            self._held.append({})
        return self._held[index]

    def _find(self, index: int, name: str) -> Value | None:
        if name in self._feed:
            return self._feed[name]
        if index < len(self._held) and name in self._held[index]:
            return self._store.get(self._held[index][name])
        return None if self._base is None else self._base._find(index, name)

    def _at(self, index: int, name: str, device: torch.device) -> Value | None:
        """Return a value of one batch; on a GPU, where one is given, all but empty ones."""
        own = name in self._feed or (index < len(self._held) and name in self._held[index])
        if not own and self._base is not None:
            return self._base._at(index, name, device)
        if device.type != "cuda":
            return self._find(index, name)
        if self._lifted[0] != index:
            self._lifted = index, {}
        lifted = self._lifted[1]
        if name not in lifted:
            value = self._find(index, name)
            if value is None or isinstance(value, torch.Tensor) or not value.size:
                return value
            lifted[name] = as_tensor(value).to(device, non_blocking=True)
        return lifted[name]

    def _tensor(self, index: int, name: str, device: torch.device) -> torch.Tensor:
        value = self._at(index, name, device)
        if value is None:
            raise _missing(name)
        return as_tensor(value).to(device)

    def _fed(self, index: int, name: str) -> Value:
        """Return a value of a feed where it is to be held."""
        array, device = self._feed[name], self._store.device
        if device is None or not array.size or not self._store.has_room(array):
            return array
        return self._tensor(index, name, device)

    def _let_go(self) -> None:
        """Forget what was copied to the device."""
        self._lifted = -1, {}
        if self._base is not None:
            self._base._let_go()

    def _about(self, index: int) -> tuple[NDArray[np.bool_] | None, float, Padding | None]:
        if self._base is not None:
            return self._base._about(index)
        return self._masks[index], self._weights[index], self._padding

    def _forget(self, index: int, alive: Collection[str]) -> None:
        if index < len(self._held):
            held = self._held[index]
            for name in [name for name in held if name not in alive]:
                self._store.drop(held.pop(name))


def _missing(name: str) -> ModelError:
    return ModelError(f"activation {name!r} is neither fed nor computed")
