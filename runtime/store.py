"""Where values lie between two runs, on a GPU, in memory or on disk, and how they are passed on."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from iobs_onnx.errors import ModelError
from iobs_onnx.runtime.session import PLAIN, bits_as

if TYPE_CHECKING:
    import onnxruntime as ort

Array: TypeAlias = NDArray[Any]
# On the device or on the host.
Value: TypeAlias = torch.Tensor | Array
# A value as a store holds it: on the device, on the host, or on disk.
Held: TypeAlias = torch.Tensor | Array | Path

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_ELEMENTS = {dtype.numpy(): dtype.value for dtype in (*PLAIN, ir.DataType.BFLOAT16)}
TENSORS = frozenset(f"tensor({name})" for name in ("bool", "float16", "bfloat16", "float")) | {
    *(f"tensor({sign}int{bits})" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    "tensor(double)",
}


class Store:
    """Holds values on a device up to a budget, beyond it in memory up to another, then on disk.

    Args:
        folder: where values go that no longer fit; it must exist when the first one does not.
        budget: bytes held in memory.
        device: a GPU that ONNX Runtime and torch share; None where there is none.
        room: bytes held on it.
    """

    def __init__(
        self, folder: Path, budget: int, device: torch.device | None = None, room: int = 0
    ) -> None:
        self.device = device
        self._folder = folder
        self._free, self._room = budget, room
        self._count = 0

    def has_room(self, value: Value) -> bool:
        """Whether the device could hold it as well."""
        return value.nbytes <= self._room

    def put(self, value: Value) -> Held:
        """Take a value; give it back to :meth:`get` and :meth:`drop` as what is returned.

        A tensor on the device is copied: what ONNX Runtime lent goes back to its session.
        """
        if isinstance(value, torch.Tensor):
            if self.has_room(value):
                self._room -= value.nbytes
                return value.clone()
            value = on_host(value)
        if value.nbytes <= self._free:
            self._free -= value.nbytes
            return value
        self._count += 1
        path = self._folder / f"stream-{os.getpid()}-{self._count:08d}.npy"
        try:
            np.save(path, value, allow_pickle=False)
        except OSError as error:
            # Of a full disk NumPy says only how much was written.
            number = error.errno or errno.ENOSPC
            raise OSError(number, os.strerror(number), os.fspath(path)) from error
        return path

    def get(self, held: Held) -> Value:
        """Return the value; one on disk is read anew each time."""
        if not isinstance(held, Path):
            return held
        array: Array = np.load(held, allow_pickle=False)
        return array.view(_BFLOAT16) if array.dtype.kind == "V" else array

    def drop(self, held: Held) -> None:
        """Forget a value."""
        if isinstance(held, Path):
            held.unlink()
        elif isinstance(held, torch.Tensor):
            self._room += held.nbytes
        else:
            self._free += held.nbytes


def on_host(value: Value) -> Array:
    """Return a value in memory; of one on a GPU a copy, which it can read from again at speed."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.device.type == "cuda":
        value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value)
    if value.dtype == torch.bfloat16:  # NumPy knows it by another package only
        return value.view(torch.int16).numpy().view(_BFLOAT16)
    return value.numpy()


def as_tensor(value: Value) -> torch.Tensor:
    """Return a value as a tensor where it lies."""
    if isinstance(value, torch.Tensor):
        return value
    array = value if value.flags.writeable else value.copy()
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def element(value: Value) -> int:
    """Return the ONNX element type."""
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return _ELEMENTS[_BFLOAT16 if name == "bfloat16" else np.dtype(name)]
    return _ELEMENTS[value.dtype]


def bind(binding: ort.IOBinding, name: str, value: Value) -> None:
    """Bind an input where it lies; it has to live until the run is over."""
    if isinstance(value, torch.Tensor):
        place = value.device.type, value.device.index or 0
        binding.bind_input(name, *place, element(value), tuple(value.shape), value.data_ptr())
    elif value.dtype == _BFLOAT16:
        bits = np.ascontiguousarray(value).view(np.uint16)
        binding.bind_ortvalue_input(name, bits_as(bits, element(value)))
    else:
        binding.bind_cpu_input(name, np.ascontiguousarray(value))


def value_of(made: ort.OrtValue, name: str) -> Value:
    """Return what a session made: on a GPU as it lies there, else a copy of its own.

    A view would keep all memory of its session alive.
    """
    kind = made.data_type()
    if kind not in TENSORS:
        raise ModelError(
            f"value {name!r} is a {kind}, which cannot be handed from one segment to "
            "the next: raise the memory budget and use sequential none"
        )
    if made.device_name().lower() == "cuda":
        tensor = from_dlpack(made)
        return tensor.view(torch.bool) if kind == "tensor(bool)" else tensor
    if kind == "tensor(bfloat16)":
        return on_host(from_dlpack(made).clone())
    array: Array = made.numpy()
    return array
