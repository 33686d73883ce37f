"""A GPU that is not there: CPU tensors that say they lie on `cuda:N`, and sessions that run there.

Tensors of the emulated GPU refuse to meet those of the host, as on a real one. What a real one
would copy over the bus, and what the host would have to wait for, is counted. Nothing here shows
what a GPU computes, how fast, or in how much memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

engine, calibrate, session, stream, store = map(  # as modules: some names are functions, too
    import_module,
    (
        "iobs_onnx.engine",
        *(f"iobs_onnx.runtime.{n}" for n in ("calibrate", "session", "stream", "store")),
    ),
)

PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]
_DEVICE = torch.Tensor.device.__get__
_IS_CUDA = torch.Tensor.is_cuda.__get__
_WAIT = {"item", "__bool__", "__float__", "__int__", "__index__", "tolist", "nonzero", "bincount"}


class Mixed(AssertionError):
    """A tensor on the GPU met one on the host."""


@dataclass
class Gpu:
    """The emulated GPU, and what was counted.

    Attributes:
        index: its number.
        free: bytes that it says are free, and in all.
        counts: `bound`, outputs that stayed on it, of `outputs`; inputs that were there (`read`) of
            `inputs`; `up`, `down`: copies over the bus; `waits` of the host for it.
        traffic: bytes `up` and `down`.
        uploads: how often each input of a model was copied up.
    """

    index: int = 0
    free: int = 1 << 33
    counts: Counter[str] = field(default_factory=Counter)
    traffic: Counter[str] = field(default_factory=Counter)
    uploads: Counter[int] = field(default_factory=Counter)

    @property
    def device(self) -> torch.device:
        """As torch calls it."""
        return torch.device("cuda", self.index)

    def moved(self, way: str, size: int) -> None:
        """Count a copy over the bus."""
        self.counts[way] += 1
        self.traffic[way] += size


class OnGpu(torch.Tensor):
    """A tensor of the emulated GPU."""

    gpu: Gpu

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(cls.gpu, func, args, kwargs or {})


class Emulated(TorchFunctionMode):
    """Makes on the emulated GPU what is to be made on a CUDA device."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(self.gpu, func, args, kwargs or {})


def _call(gpu: Gpu, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", "")
    flat = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    here = [each for each in flat if isinstance(each, OnGpu)]
    with torch._C.DisableTorchFunctionSubclass():
        if func == _DEVICE and here:
            return gpu.device
        if func == _IS_CUDA and here:
            return True
        if name in ("to", "cpu", "copy_", "numpy", "cuda") and isinstance(args[0], torch.Tensor):
            return _moved(gpu, name, args, kwargs)
        asked = kwargs.get("device")
        made = asked is not None and torch.device(asked).type == "cuda"
        if made:
            assert torch.device(asked).index in (None, gpu.index), f"made on {asked}"
            kwargs = {**kwargs, "device": "cpu"}
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        if here and name not in ("__getitem__", "__setitem__"):  # which take indices of the host
            for each in flat:
                if not isinstance(each, OnGpu) and each.ndim:
                    raise Mixed(f"{name}: {tuple(each.shape)} lies on the host")
        if here and (name in _WAIT or _picks(name, args)):
            gpu.counts["waits"] += 1
        plain: dict[int, torch.Tensor] = {}

        def bare(each: Any) -> Any:
            if not isinstance(each, OnGpu):
                return each
            found = each.as_subclass(torch.Tensor)
            plain[id(found)] = each
            kept.append(found)
            return found

        kept: list[torch.Tensor] = []  # so that no id is used twice
        found = func(*tree_map(bare, args), **tree_map(bare, kwargs))
        if not (here or made):
            return found
        if func is torch.tensor or func is torch.as_tensor:
            gpu.moved("up", found.nbytes)

        def wrapped(each: Any) -> Any:
            if not isinstance(each, torch.Tensor):
                return each
            return plain[id(each)] if id(each) in plain else _on(gpu, each)

        if isinstance(found, Iterator):
            return map(wrapped, found)
        return tree_map(wrapped, found)


def _picks(name: str, args: Any) -> bool:
    """Whether a mask picks elements: how many, the host has to ask."""
    index = args[1:2] if name == "__getitem__" else ()
    masks = (each for each in tree_flatten(index)[0] if isinstance(each, OnGpu))
    return any(each.dtype == torch.bool for each in masks)


def _on(gpu: Gpu, tensor: torch.Tensor) -> OnGpu:
    OnGpu.gpu = gpu
    return tensor.detach().as_subclass(OnGpu)


def _moved(gpu: Gpu, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    value, *rest = args
    plain = value.as_subclass(torch.Tensor)
    there = isinstance(value, OnGpu)
    if name == "numpy":
        assert not there, "numpy() of a tensor on the GPU"
        return plain.numpy()
    if name == "copy_":
        if isinstance(rest[0], OnGpu) != there:
            gpu.moved("up" if there else "down", plain.nbytes)
        plain.copy_(rest[0].as_subclass(torch.Tensor))
        return value
    if name == "cpu":
        rest = ["cpu"]
    devices = [
        kwargs.get("device"),
        *(each for each in rest if isinstance(each, str | torch.device)),
    ]
    dtypes = [kwargs.get("dtype"), *(each for each in rest if isinstance(each, torch.dtype))]
    device = next((torch.device(each) for each in devices if each is not None), None)
    dtype = next((each for each in dtypes if each is not None), None)
    for other in rest:  # `to(other)`: its type and device
        if isinstance(other, torch.Tensor):
            device, dtype = torch.device("cuda" if isinstance(other, OnGpu) else "cpu"), other.dtype
    goes = there if device is None else device.type == "cuda"
    if goes != there:
        gpu.moved("up" if goes else "down", plain.nbytes)
        gpu.counts["waits"] += not goes
        plain = plain.clone()
    found = plain if dtype is None else plain.to(dtype)
    if goes == there and found is plain:
        return value
    return _on(gpu, found) if goes else found


@dataclass
class Made:
    """An output of an emulated run."""

    value: Any
    there: bool

    def data_type(self) -> str:
        return str(self.value.data_type())

    def device_name(self) -> str:
        return "Cuda" if self.there else "Cpu"

    def numpy(self) -> Any:
        assert not self.there, "numpy() of an output on the GPU"
        return self.value.numpy()


class Binding:
    """Counts what is bound where."""

    def __init__(self, gpu: Gpu, session: Any) -> None:
        self._gpu, self._there = gpu, {}
        self.real = session.io_binding()

    def bind_cpu_input(self, name: str, array: Any) -> None:
        self._gpu.counts["inputs"] += 1
        if array.size:
            self._gpu.moved("up", array.nbytes)
            self._gpu.uploads[array.__array_interface__["data"][0]] += 1
        self.real.bind_cpu_input(name, array)

    def bind_input(
        self, name: str, device: str, index: int, kind: Any, shape: Any, pointer: int
    ) -> None:
        assert (device, index) == ("cuda", self._gpu.index)
        self._gpu.counts["inputs"] += 1
        self._gpu.counts["read"] += 1
        self.real.bind_input(name, "cpu", 0, kind, shape, pointer)

    def bind_output(self, name: str, device: str = "cpu", index: int = 0) -> None:
        self._there[name] = device == "cuda"
        assert index == (self._gpu.index if device == "cuda" else 0)
        self._gpu.counts["outputs"] += 1
        self._gpu.counts["bound"] += self._there[name]
        self.real.bind_output(name, "cpu")

    def get_outputs(self) -> list[Made]:
        found = [
            Made(v, t) for v, t in zip(self.real.get_outputs(), self._there.values(), strict=True)
        ]
        for each in found:
            if not each.there:
                self._gpu.moved("down", np.asarray(each.value.numpy()).nbytes)
        return found


class Session:
    """A session on the CPU that says it is on CUDA."""

    def __init__(self, gpu: Gpu, real: Any) -> None:
        self._gpu, self._real = gpu, real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_providers(self) -> list[str]:
        return PROVIDERS

    def io_binding(self) -> Binding:
        return Binding(self._gpu, self._real)

    def run_with_iobinding(self, binding: Binding) -> None:
        self._gpu.counts["runs"] += 1
        self._real.run_with_iobinding(binding.real)


@contextmanager
def emulated(gpu: Gpu) -> Iterator[Gpu]:
    """Give torch and ONNX Runtime a GPU, as far as pruning asks for one."""
    real_dlpack, real_generator = torch.utils.dlpack.from_dlpack, torch.Generator
    real_open = session.open_session

    class Pool(ThreadPoolExecutor):
        def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            def within() -> Any:
                with Emulated(gpu):
                    return function(*args, **kwargs)

            return super().submit(within)

    def dlpack(made: Any) -> torch.Tensor:
        if not isinstance(made, Made):
            return real_dlpack(made)
        tensor = real_dlpack(made.value)
        return _on(gpu, tensor) if made.there else tensor

    def opened(model: Any, provider: str = "auto", **how: Any) -> Any:
        if provider == "cpu":
            return real_open(model, provider, **how)
        assert how.pop("gpu", gpu.index) == gpu.index
        return Session(gpu, real_open(model, "cpu", **how))

    def waited(*_: Any) -> None:
        gpu.counts["waits"] += 1

    class Generator:
        def __new__(cls, *_: Any) -> Any:
            return real_generator()

    patches = {
        torch.cuda: {
            "is_available": lambda: True,
            "device_count": lambda: gpu.index + 1,
            "mem_get_info": lambda *_: (gpu.free, gpu.free),
            "synchronize": waited,
            "set_device": lambda *_: None,
        },
        torch: {"Generator": Generator},
        engine: {
            "open_session": opened,
            "settle_provider": lambda provider, _: "cpu" if provider == "cpu" else "cuda",
        },
        stream: {"from_dlpack": dlpack},
        store: {"from_dlpack": dlpack},
        calibrate: {"ThreadPoolExecutor": Pool},
    }
    with ExitStack() as stack:
        for module, names in patches.items():
            for name, value in names.items():
                stack.enter_context(patch.object(module, name, value))
        stack.enter_context(Emulated(gpu))
        yield gpu
