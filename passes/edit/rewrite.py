"""Exchange stored weights, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.errors import CheckError
from iobs_onnx.passes.graph.tensors import Slot, stored_slots


def rewrite(
    model: ir.Model, weights: Mapping[str, NDArray[np.generic] | ir.TensorProtocol]
) -> None:
    """Replace stored tensors in `model`, in place; name, doc string and metadata stay.

    Other models that share the old tensors keep them. Nothing is replaced when one does not fit.

    Args:
        model: a model of the caller's own (:func:`iobs_onnx.passes.load_model` makes one).
        weights: the name of an initializer or of a Constant node's output
            (`Site.initializer`) to the new array or tensor, in the stored shape and dtype. They
            are kept, not copied.

    Raises:
        CheckError: there is no such tensor in the main graph, or shape or dtype differ.
    """
    stored = stored_slots(model)
    exchanges: list[tuple[Slot, ir.TensorProtocol]] = []
    for name, array in weights.items():
        slot = stored.get(name)
        if slot is None:
            raise CheckError(f"weight {name!r}: the model stores no such tensor")
        old = slot.tensor
        new = as_tensor(array, old)
        if new.dtype != old.dtype or new.shape != old.shape:
            raise CheckError(
                f"weight {name!r}: expected {old.dtype.numpy()} {tuple(old.shape.numpy())}, got "
                f"{new.dtype.numpy()} {tuple(new.shape.numpy())}"
            )
        exchanges.append((slot, new))
    for slot, tensor in exchanges:
        slot.put(tensor)


def as_tensor(
    values: NDArray[np.generic] | ir.TensorProtocol, old: ir.TensorProtocol
) -> ir.TensorProtocol:
    """Return new values as a tensor that is named and described as the old one.

    Args:
        values: an array, or a tensor, which is itself renamed.
        old: gives the ONNX type, where the array's NumPy type is its own.
    """
    if isinstance(values, np.ndarray):
        dtype = old.dtype if values.dtype == old.dtype.numpy() else None
        values = ir.Tensor(np.ascontiguousarray(values), dtype=dtype)
    values.name = old.name
    values.doc_string = old.doc_string
    values.metadata_props.update(old.metadata_props)
    return values
