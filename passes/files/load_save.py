"""Models on disk: load one without touching its weights, write one without leaving a mess."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from safetensors.numpy import save_file

from iobs_onnx.errors import ModelError, OptionError
from iobs_onnx.passes.files import preserve, protos
from iobs_onnx.passes.files.atomic import replacing_all
from iobs_onnx.passes.graph import walk
from iobs_onnx.passes.graph.tensors import slots

PROTOBUF_LIMIT = 2**31 - 1
# Leaves room below that limit for all that is not a tensor.
MAX_INLINE_BYTES = 2_000_000_000
# Smaller tensors (shapes, axes, scalars) stay in the model, where runtimes want them.
_MIN_EXTERNAL_BYTES = 1024
_ORIGIN = "iobs_onnx.origin"


@dataclass(frozen=True)
class _Origin:
    """Where a model came from; goes with the graph through clones, never into a file."""

    path: Path | None
    external: bool


def load_model(model: str | os.PathLike[str] | onnx.ModelProto | ir.Model) -> ir.Model:
    """Return a model that shares no graph with the caller's; weights stay where they are.

    External tensors stay memory-mapped; the tensors of a `ModelProto` or `ir.Model` are shared.

    Raises:
        ModelError: the file is missing, empty or not ONNX; tensors do not fit their shapes; the
            model holds what would be lost on the way or is not sorted; external data are missing,
            too short, or outside the model's folder.
    """
    path: Path | None = None
    if isinstance(model, ir.Model):
        label = f"model {model.graph.name!r}"
        _require_connected(model, label)
        loaded = model.clone()
        origin = _origin(model)
        path = origin.path
    elif isinstance(model, onnx.ModelProto):
        label = f"model {model.graph.name!r}"
        loaded = protos.from_proto(model, label)
        if _external_tensors(loaded):
            raise ModelError(f"{label}: external data need a folder; give the path of the file")
    else:
        path, label = Path(model).absolute(), str(model)
        loaded = protos.from_proto(_read(path, label), label)
        for tensor in _external_tensors(loaded):
            tensor.base_dir = path.parent
    _require_connected(loaded, label)
    for tensor in _external_tensors(loaded):
        _require_data(tensor, label)
    external = _origin(loaded).external or bool(_external_tensors(loaded))
    loaded.graph.meta[_ORIGIN] = _Origin(path, external)
    return loaded


def save_model(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    masks: Mapping[str, NDArray[np.bool_]] | None = None,
) -> None:
    """Write a model so that its file is either whole or not there.

    Initializers of 1 KiB and more go to `<name>.data` beside it when the model was loaded with
    external data or would exceed protobuf's 2 GB. They are copied one at a time, and the data
    file is packed anew, so nothing of a replaced weight stays in it. `masks` go to
    `<name>.masks.safetensors`, by the names of stored tensors. All files are written beside their
    places and then renamed, the model last.

    Raises:
        OptionError: the folder does not exist or cannot be written, or the output would
            overwrite a file that the model was loaded from.
    """
    with saving(model, path, masks=masks):
        pass


@contextmanager
def saving(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    masks: Mapping[str, NDArray[np.bool_]] | None = None,
    beside: Sequence[Path] = (),
) -> Iterator[Path]:
    """Write a model as :func:`save_model` does, but look at it before it is put in its place.

    Files `beside` are copied into its folder, and replace what has their names there.

    Yields:
        The file, whole, beside its place. An exception leaves nothing behind.
    """
    target, data, external = _output_files(model, path)
    model = model.clone()
    try:
        copies = [target.with_name(file.name) for file in beside]
        with replacing_all([*copies, mask_file(target), data, target]) as folder:
            for file in beside:
                shutil.copyfile(file, folder / file.name)
            if external:
                _externalize(model, os.fspath(folder), data.name)
            else:
                bring_into_memory(model)
            written = folder / target.name
            written.write_bytes(protos.to_proto(model).SerializeToString())
            if masks is not None:
                save_file(dict(masks), folder / mask_file(target).name, {"True": "kept"})
            yield written
    except OSError as error:
        raise OptionError(f"output {path}: cannot be written ({error.strerror})") from error


def mask_file(path: str | os.PathLike[str]) -> Path:
    """Return where :func:`save_model` puts the masks of a model."""
    target = Path(path).absolute()
    return target.with_name(f"{target.name}.masks.safetensors")


def bring_into_memory(model: ir.Model) -> None:
    """Read every external tensor of a model, in place, so that its files may go."""
    for slot in slots(model):
        tensor = slot.tensor
        if isinstance(tensor, ir.ExternalTensor) and not preserve.stays_sparse(slot):
            slot.put(ir.external_data.convert_tensors_from_external([tensor])[0])


def require_output(model: ir.Model, path: str | os.PathLike[str]) -> None:
    """Raise what :func:`save_model` would, before hours are spent on what cannot be written.

    Raises:
        OptionError: the output is a folder, or would overwrite a file that the model was loaded
            from.
    """
    _output_files(model, path)


def model_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256, in hexadecimal, of a model file and its external data files.

    Without external data this is the file's own SHA-256. Data files follow sorted by name, each
    as its name in UTF-8 and its bytes.

    Raises:
        ModelError: as :func:`load_model`.
    """
    file, *data = model_files(path)
    digest = hashlib.sha256(file.read_bytes())
    for other in data:
        digest.update(os.fspath(other.relative_to(file.parent)).encode())
        with other.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def model_files(path: str | os.PathLike[str]) -> list[Path]:
    """Return a model's file, then those of its external data, sorted by name.

    Raises:
        ModelError: as :func:`load_model`.
    """
    file = Path(path).absolute()
    locations = {os.fspath(tensor.location) for tensor in _external_tensors(load_model(file))}
    return [file, *(file.parent / location for location in sorted(locations))]


def _origin(model: ir.Model) -> _Origin:
    origin = model.graph.meta.get(_ORIGIN)
    return origin if isinstance(origin, _Origin) else _Origin(None, external=False)


def _external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    held = (slot.tensor for slot in slots(model))
    return [tensor for tensor in held if isinstance(tensor, ir.ExternalTensor)]


def _read(path: Path, label: str) -> onnx.ModelProto:
    try:
        status = path.stat()
        # A pipe may never end, a device never does.
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"{label}: not a regular file; give the path of an .onnx file")
        if status.st_size > PROTOBUF_LIMIT:
            raise ModelError(
                f"{label}: {status.st_size} bytes, more than protobuf reads (2 GB); save it with "
                "external data"
            )
        return onnx.load_model(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise ModelError(f"{label}: cannot be read ({error.strerror}); check the path") from error
    except DecodeError as error:
        raise ModelError(f"{label}: not an ONNX file, or cut off; export it again") from error


def _require_connected(model: ir.Model, label: str) -> None:
    """Refuse graphs that read what nothing computes, or read it before it is computed."""
    done: set[ir.Node] = set()
    parts: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for part in parts:
        _require_order(part, done, label)


def _require_order(scope: ir.Graph | ir.Function, done: set[ir.Node], label: str) -> None:
    for node in scope:
        for value in node.inputs:
            if value is not None:
                _require_source(value, f"node {node.name!r}", done, label)
        # A body may not read what its own node puts out.
        for body in walk.subgraphs(node):
            _require_order(body, done, label)
        done.add(node)
    for value in scope.outputs:
        _require_source(value, "an output", done, label)


def _require_source(value: ir.Value, reader: str, done: set[ir.Node], label: str) -> None:
    producer = value.producer()
    if producer is None and not (value.is_graph_input() or value.is_initializer()):
        raise ModelError(
            f"{label}: {value.name!r} is read, but nothing in its graph computes it; mend the model"
        )
    if producer is not None and producer not in done:
        raise ModelError(
            f"{label}: {reader} stands before {producer.name!r}, whose output it reads; sort the "
            "nodes (onnx_ir.passes.common.TopologicalSortPass), or mend them if they form a circle"
        )


def _require_data(tensor: ir.ExternalTensor, label: str) -> None:
    location = os.fspath(tensor.location)
    what = f"{label}: external data file {location!r:.200} of tensor {tensor.name!r}"
    if "\0" in location:
        raise ModelError(f"{what} is not a file name; mend the model")
    # Unlike Path.resolve, these do not raise where links run in a circle.
    folder = os.path.realpath(tensor.base_dir)
    file = Path(os.path.realpath(os.path.join(folder, location)))
    if not file.is_relative_to(folder):
        raise ModelError(f"{what} leaves the model's folder; copy it there, links resolved")
    try:
        status = file.stat()
    except FileNotFoundError as error:
        raise ModelError(f"{what} is missing; put it beside the model") from error
    except OSError as error:
        raise ModelError(f"{what} cannot be read ({error.strerror}); check it") from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{what} is not a regular file; put the data beside the model")
    if status.st_nlink > 1:
        raise ModelError(f"{what} has several hard links, which onnx_ir refuses; copy it")
    start = tensor.offset or 0
    length = tensor.nbytes if tensor.length is None else tensor.length
    if start < 0 or length < tensor.nbytes or start + length > status.st_size:
        raise ModelError(
            f"{what} is too short: bytes {start} to {start + tensor.nbytes} are needed, it has "
            f"{status.st_size}; download or export it again"
        )


def _output_files(model: ir.Model, path: str | os.PathLike[str]) -> tuple[Path, Path, bool]:
    """Return the model's file, its data file, and whether the latter is wanted."""
    target = Path(path).absolute()
    data = target.with_name(f"{target.name}.data")
    if target.is_dir():
        raise OptionError(f"output {path}: is a folder; give a file in it")
    inline = (slot for slot in slots(model) if not preserve.stays_sparse(slot))
    inline_bytes = sum(slot.tensor.nbytes for slot in inline)
    external = _origin(model).external or inline_bytes > MAX_INLINE_BYTES
    _forbid_overwriting(model, [target, data] if external else [target])
    return target, data, external


def _forbid_overwriting(model: ir.Model, outputs: list[Path]) -> None:
    sources = {Path(tensor.path) for tensor in _external_tensors(model)}
    if (path := _origin(model).path) is not None:
        sources.add(path)
    for output in outputs:
        for source in sources:
            if output.exists() and source.exists() and output.samefile(source):
                raise OptionError(
                    f"output {output}: would overwrite the model it is made from; "
                    "choose another name"
                )


def _externalize(model: ir.Model, folder: str, name: str) -> None:
    """Move the large initializers to one new data file and bring all others into the model."""
    large = []
    for slot in slots(model):
        tensor = slot.tensor
        if preserve.stays_sparse(slot):
            continue
        is_raw = slot.attribute is None and tensor.dtype != ir.DataType.STRING
        if is_raw and tensor.nbytes >= _MIN_EXTERNAL_BYTES:
            large.append(slot)
        elif isinstance(tensor, ir.ExternalTensor):
            slot.put(ir.external_data.convert_tensors_from_external([tensor])[0])
    if large:
        moved = ir.external_data.convert_tensors_to_external(
            [slot.tensor for slot in large], folder, name
        )
        for slot, tensor in zip(large, moved, strict=True):
            # onnx_ir (1.1) leaves these two behind.
            tensor.doc_string = slot.tensor.doc_string
            tensor.metadata_props.update(slot.tensor.metadata_props)
            slot.put(tensor)
