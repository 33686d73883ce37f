"""Open a model in ONNX Runtime, on the CPU or on CUDA, and describe its inputs."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from iobs_onnx.errors import DependencyError, ModelError, OptionError
from iobs_onnx.runtime.device import cuda_options
from iobs_onnx.runtime.head_size import head_size

if TYPE_CHECKING:
    import onnxruntime as ort

Model: TypeAlias = str | os.PathLike[str] | onnx.ModelProto | ir.Model
Provider: TypeAlias = Literal["auto", "cpu", "cuda"]

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
# Levels of ONNX Runtime's log. Its errors come back as exceptions, so it need not print them.
_ERROR, _FATAL = 3, 4
# What it says where memory is full, and what to do then.
_FULL = ("Failed to allocate memory", "out of memory", "smaller than requested bytes")
_FEWER = "memory is full: make --batch-size or --memory-budget smaller, or use --provider cpu"
_PROTOBUF_LIMIT = 2**31 - 1
# Smaller tensors stay in the message: shapes and axes, whose values ONNX Runtime must see.
_PASSED_BESIDE = 1024
# Element types that a feed, and a weight passed beside the message, can have.
PLAIN = frozenset(
    {
        *(ir.DataType.BOOL, ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE),
        *(ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64),
        *(ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64),
    }
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputSpec:
    """What a feed must hold for one input of a model.

    `shape` has a number for each static dimension and None for the others, or is None where the
    model does not say the rank. An input that is `optional` has a default in the model.
    """

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[int | None, ...] | None
    optional: bool = False

    @property
    def cache(self) -> bool:
        """Whether it holds past keys or values, whose number may be 0."""
        return self.name.startswith("past_key_values")


def open_session(
    model: Model, provider: Provider = "auto", *, threads: int = 0, gpu: int = 0
) -> ort.InferenceSession:
    """Load a model into ONNX Runtime.

    Args:
        model: a file, or a model in memory. External data is found beside the file; an
            `onnx_ir.Model` knows its folders, a `ModelProto` means the working directory. The
            external data of an `onnx_ir.Model` are mapped into memory and not copied on the CPU.
        provider: `auto` takes CUDA where it works and the CPU elsewhere, and logs which.
        threads: that an operator may take; 0 for one a core.
        gpu: the number of the GPU, where CUDA is taken.

    Raises:
        DependencyError: no onnxruntime is installed, or `cuda` is asked for and cannot be had.
        ModelError: ONNX Runtime refuses the model.
        OptionError: an unknown provider.
    """
    runtime = _onnxruntime()
    available = _has_cuda(runtime, provider)
    source, folder, weights = _source(runtime, model)
    # Folding and prepacking copy weights, several times over while the session is opened. All
    # models in memory go without, so that two of them round alike wherever their weights lie.
    lean = isinstance(model, ir.Model)
    disabled = ["ConstantFolding"] if lean else []
    if available:
        options = _options(runtime, folder, weights, threads, lean=lean, severity=_ERROR)
        session, fault = _try_cuda(runtime, source, options, disabled, gpu)
        if session is not None:
            session.weights = weights
            return session
        if provider == "cuda":
            raise DependencyError(
                f"provider cuda: ONNX Runtime {fault}; put that right, or use --provider cpu"
            )
        logger.warning("ONNX Runtime runs on the CPU: it %s", fault)
    with _refusals(runtime, f"model {_label(model)}: ONNX Runtime cannot load it"):
        session = runtime.InferenceSession(
            source,
            _options(runtime, folder, weights, threads, lean=lean),
            providers=[_CPU],
            enable_fallback=0,
            disabled_optimizers=disabled,
        )
    # ONNX Runtime reads the weights in place: they must live as long as the session.
    session.weights = weights
    logger.info("ONNX Runtime %s on %s", runtime.__version__, session.get_providers())
    return session


def _has_cuda(runtime: ModuleType, provider: Provider) -> bool:
    """Whether CUDA is wanted and ONNX Runtime was built with it."""
    if provider not in ("auto", "cpu", "cuda"):
        raise OptionError(f"provider {provider!r}: expected auto, cpu or cuda")
    available = provider != "cpu" and _CUDA in runtime.get_available_providers()
    if provider == "cuda" and not available:
        raise DependencyError(
            "provider cuda: the installed onnxruntime has no CUDA provider; "
            "pip uninstall onnxruntime, then pip install 'iobs-onnx[gpu]'"
        )
    return available


def settle_provider(provider: Provider, gpu: int = 0) -> Literal["cpu", "cuda"]:
    """Say where a run computes, by a session of one operator: it is to compute there throughout.

    Raises:
        DependencyError, OptionError: as for :func:`open_session`.
    """
    if not _has_cuda(_onnxruntime(), provider):
        return "cpu"
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    node = onnx.helper.make_node("Abs", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "probe", value[:1], value[1:])
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    return "cuda" if on_cuda(open_session(model, provider, gpu=gpu)) else "cpu"


def available_providers() -> list[str]:
    """Return the execution providers that the installed ONNX Runtime was built with.

    Raises:
        DependencyError: no onnxruntime is installed.
    """
    return list(_onnxruntime().get_available_providers())


def session_info(session: ort.InferenceSession) -> dict[str, object]:
    """Return the version of ONNX Runtime and the execution providers in use, for a report."""
    return {"onnxruntime": _onnxruntime().__version__, "providers": session.get_providers()}


def on_cuda(session: ort.InferenceSession) -> bool:
    """Whether the session really runs on CUDA."""
    return _CUDA in session.get_providers()


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """Return what a feed must hold, required inputs first.

    Raises:
        ModelError: an input is not a tensor that NumPy can hold.
    """
    required = [value for value in model.graph.inputs if not value.is_initializer()]
    # Before IR version 4 every initializer was an input, and a constant all the same.
    optional = [v for v in model.graph.inputs if v.is_initializer() and (model.ir_version or 4) > 3]
    return (
        *(_spec(value, optional=False) for value in required),
        *(_spec(value, optional=True) for value in optional),
    )


def taken(session: ort.InferenceSession, feed: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a feed what a session takes, in the types it takes.

    Where a part of a model computes in float32 what the model computes in float16, it takes the
    model's float16 inputs as float32.
    """
    args = (*session.get_inputs(), *session.get_overridable_initializers())
    narrow = {name for name, array in feed.items() if array.dtype == np.float16}
    wide = {arg.name for arg in args if arg.type == "tensor(float)"} & narrow
    own = {arg.name: feed[arg.name] for arg in args if arg.name in feed}
    return {name: a.astype(np.float32) if name in wide else a for name, a in own.items()}


def bits_as(bits: NDArray[np.uint16], element: int) -> ort.OrtValue:
    """Return numbers of a type that NumPy lacks, of their bits; they live as long as it does."""
    return _onnxruntime().OrtValue.ortvalue_from_numpy_with_onnx_type(bits, element)


@contextmanager
def run_errors() -> Iterator[None]:
    """Turn what ONNX Runtime raises while it runs a model into a one-line ModelError."""
    with _refusals(_onnxruntime(), "ONNX Runtime cannot run the model on this feed"):
        yield


def _onnxruntime() -> ModuleType:
    try:
        import onnxruntime  # noqa: PLC0415  # an extra: the CPU and GPU wheels exclude each other
    except ImportError as error:
        raise DependencyError(
            "onnxruntime is not installed: pip install 'iobs-onnx[cpu]' or 'iobs-onnx[gpu]'"
        ) from error
    return onnxruntime


def _options(
    runtime: ModuleType,
    folder: str | None,
    weights: dict[str, ort.OrtValue],
    threads: int,
    *,
    lean: bool,
    severity: int = _FATAL,
) -> ort.SessionOptions:
    options = runtime.SessionOptions()
    options.log_severity_level = severity
    options.intra_op_num_threads = threads
    # ONNX Runtime's idle threads would keep the cores that the Gram matrices need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", folder
        )
    if lean:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if weights:
        options.add_external_initializers(list(weights), list(weights.values()))
    return options


def _try_cuda(
    runtime: ModuleType,
    source: str | bytes,
    options: ort.SessionOptions,
    disabled: list[str],
    gpu: int,
) -> tuple[ort.InferenceSession | None, str]:
    """Return a session on CUDA, or None where the provider does not come up, and why not."""
    try:
        session = runtime.InferenceSession(
            source,
            options,  # of a severity that names the library that is missing
            providers=[(_CUDA, cuda_options(gpu)), _CPU],
            enable_fallback=0,
            disabled_optimizers=disabled,
        )
    except _exceptions(runtime) as error:
        # A model at fault fails on the CPU too, where its error is reported.
        return None, f"failed on CUDA ({_one_line(error)})"
    # A library that does not load leaves the CPU provider alone, without an error.
    fault = "could not load CUDA and cuDNN (its log says which library)"
    return (session, "") if on_cuda(session) else (None, fault)


def _source(
    runtime: ModuleType, model: Model
) -> tuple[str | bytes, str | None, dict[str, ort.OrtValue]]:
    """Return the message for InferenceSession, the folder of its data, and tensors beside it."""
    if isinstance(model, str | os.PathLike):
        if not Path(model).is_file():
            raise ModelError(f"model {os.fspath(model)}: no such file")
        return os.fspath(model), None, {}
    folder: str | None = None
    weights: dict[str, ort.OrtValue] = {}
    if isinstance(model, ir.Model):
        model, weights = _weights_beside(runtime, model)
        folder = _gather_files(model, weights)
        model = ir.to_proto(model)
    try:
        return model.SerializeToString(), folder, weights
    except (ValueError, EncodeError) as error:
        raise ModelError(_too_large(model)) from error


def _weights_beside(
    runtime: ModuleType, model: ir.Model
) -> tuple[ir.Model, dict[str, ort.OrtValue]]:
    """Return a copy whose large initializers in memory are only named, and their values."""
    beside = model.clone()
    values = {}
    for name, value in beside.graph.initializers.items():
        tensor = value.const_value
        if (
            tensor is None
            or isinstance(tensor, ir.ExternalTensor)
            or tensor.dtype not in PLAIN
            or tensor.nbytes < _PASSED_BESIDE
            or value.is_graph_input()
            or not value.uses()  # ONNX Runtime drops it before it looks for its values
        ):
            continue
        array = np.ascontiguousarray(tensor.numpy())
        values[name] = runtime.OrtValue.ortvalue_from_numpy(array)
        value.const_value = ir.ExternalTensor(
            name, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
    return beside, values


def _gather_files(model: ir.Model, beside: Collection[str]) -> str | None:
    """Name all external data from one folder, in place, and return it; None if there are none."""
    values = [
        value
        for graph in model.graphs()
        for name, value in graph.initializers.items()
        if not (graph is model.graph and name in beside)
    ]
    files, within = [], 0
    for value in values:
        if isinstance(value.const_value, ir.ExternalTensor):
            # ONNX Runtime refuses links that lead out of the folder.
            files.append((value, value.const_value, os.path.realpath(value.const_value.path)))
        elif value.const_value is not None:
            within += value.const_value.nbytes
    # Found before the weights are copied into a message that cannot hold them.
    if within > _PROTOBUF_LIMIT:
        raise ModelError(_too_large(model))
    if not files:
        return None
    try:
        folder = os.path.commonpath([os.path.dirname(path) for _, _, path in files])
    except ValueError as error:
        raise ModelError(
            f"model {_label(model)}: its external data are on several drives; save it to one "
            "place first"
        ) from error
    for value, tensor, path in files:
        value.const_value = ir.ExternalTensor(
            os.path.relpath(path, folder),
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name or "",
            base_dir=folder,
        )
    return folder


def _too_large(model: Model) -> str:
    return (
        f"model {_label(model)}: more than 2 GB in memory do not fit one message; save it with "
        "external data and pass the path"
    )


def _label(model: Model) -> str:
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    return repr(model.graph.name or "in memory")


def _spec(value: ir.Value, *, optional: bool) -> InputSpec:
    if not isinstance(value.type, ir.TensorType) or value.dtype not in PLAIN:
        raise ModelError(f"input {value.name!r}: its type {value.type} cannot be fed from NumPy")
    shape = None
    if value.shape is not None:
        # Paddle2ONNX writes a dynamic axis as -1.
        shape = tuple(dim if isinstance(dim, int) and dim >= 0 else None for dim in value.shape)
    if shape is not None and len(shape) == 4 and shape[-1] is None:
        shape = (*shape[:-1], head_size(value))
    return InputSpec(value.name or "", value.dtype.numpy(), shape, optional)


@contextmanager
def _refusals(runtime: ModuleType, what: str) -> Iterator[None]:
    try:
        yield
    except _exceptions(runtime) as error:
        fault = _one_line(error)
        remedy = f"; {_FEWER}" if any(words in fault for words in _FULL) else ""
        raise ModelError(f"{what}: {fault}{remedy}") from error


def _exceptions(runtime: ModuleType) -> tuple[type[Exception], ...]:
    """Everything ONNX Runtime raises: its own classes have no common base but Exception."""
    binding = runtime.capi.onnxruntime_pybind11_state
    own = (value for value in vars(binding).values() if isinstance(value, type))
    return (RuntimeError, ValueError, *(kind for kind in own if issubclass(kind, Exception)))


def _one_line(error: Exception) -> str:
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip()).split("\n")[0]
