"""Forms in which pruned weights leave: ONNX's own sparse tensors, and masks beside dense ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper

from iobs_onnx.errors import OptionError
from iobs_onnx.passes.files import preserve
from iobs_onnx.passes.graph.tensors import Slot, stored_slots
from iobs_onnx.site import Site

# A message cannot be larger, and no sparse tensor can lie outside it.
_MAX_SPARSE_BYTES = 2_000_000_000
# The first IR version with sparse initializers, and the first opset of Constant's `sparse_value`.
_SPARSE_IR, _SPARSE_OPSET = 6, 11


def store_sparsely(model: ir.Model, sites: Iterable[Site]) -> dict[str, str]:
    """Have the tensors of sites written as `SparseTensorProto`; in memory they stay dense.

    Args:
        model: a model of the caller's own; nothing that computes changes.
        sites: of that model, after pruning.

    Returns:
        The names of tensors that stay dense in the file, each with the reason.

    Raises:
        OptionError: the sparse tensors exceed what one protobuf message holds.
    """
    stored = stored_slots(model)
    left: dict[str, str] = {}
    total = 0
    for site in sites:
        slot = stored[site.initializer]
        if reason := _unfit(model, slot, site):
            left[site.initializer] = reason
            continue
        sparse = _sparse(slot)
        total += len(sparse.values.raw_data) + len(sparse.indices.raw_data)
        if total > _MAX_SPARSE_BYTES:
            raise OptionError(
                "emit sparse-initializer: the sparse tensors exceed the 2 GB of one protobuf "
                "message, and ONNX has no external data for them; use --emit mask or dense"
            )
        preserve.keep_sparse(slot, sparse)
    return left


def masks_of(model: ir.Model, sites: Iterable[Site]) -> dict[str, NDArray[np.bool_]]:
    """Return for each stored tensor of the sites which values are kept, in its shape.

    That of a tensor that a node unpacks is `(out, in)`.
    """
    stored = stored_slots(model)
    return {site.initializer: _kept(stored[site.initializer], site) for site in sites}


def sparse_bytes(model: ir.Model, sites: Iterable[Site]) -> Mapping[str, int]:
    """Return the size of the sites' tensors in both forms: `dense` and `sparse-initializer`.

    A sparse tensor holds each value that is not zero and its index, an int64.
    """
    stored = stored_slots(model)
    names = dict.fromkeys(site.initializer for site in sites)
    sizes = {"dense": 0, "sparse-initializer": 0}
    for name in names:
        tensor = stored[name].tensor
        count = int(np.count_nonzero(tensor.numpy()))
        sizes["dense"] += tensor.nbytes
        sizes["sparse-initializer"] += count * (int(tensor.dtype.itemsize) + 8)
    return sizes


def _unfit(model: ir.Model, slot: Slot, site: Site) -> str:
    if slot.attribute is None and model.ir_version < _SPARSE_IR:
        return f"IR version {model.ir_version} has no sparse initializers"
    if slot.attribute is not None and model.opset_imports.get("", 1) < _SPARSE_OPSET:
        return f"Constant of opset {model.opset_imports.get('', 1)} holds no sparse tensors"
    if slot.tensor.dtype.bitwidth < 8:
        return f"{slot.tensor.dtype.name} is packed; a sparse tensor holds whole bytes"
    if site.quantized is not None and any(site.quantized.zero_point):
        return "its zero is stored as a zero point other than 0"
    return ""


def _kept(slot: Slot, site: Site) -> NDArray[np.bool_]:
    array = slot.tensor.numpy()
    real = array if site.quantized is None else site.quantized.dequantize(array)
    kept: NDArray[np.bool_] = real.astype(np.float32) != 0
    return kept


def _sparse(slot: Slot) -> onnx.SparseTensorProto:
    """Return the tensor with its values in order and their linear indices."""
    tensor = slot.tensor
    flat = np.ascontiguousarray(tensor.numpy()).reshape(-1)
    indices = np.flatnonzero(flat)
    values = onnx.TensorProto(
        name=tensor.name if slot.attribute else slot.value.name,
        data_type=tensor.dtype.value,
        dims=[len(indices)],
        raw_data=flat[indices].tobytes(),
    )
    return onnx.SparseTensorProto(
        values=values,
        indices=numpy_helper.from_array(indices.astype(np.int64), f"{values.name}_indices"),
        dims=tensor.shape.numpy(),
    )
