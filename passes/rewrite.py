"""Exchange stored weights, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.errors import CheckError
from iobs_onnx.passes.tensors import Slot, stored_slots


def rewrite(model: ir.Model, weights: Mapping[str, NDArray[np.generic]]) -> None:
    """Replace stored tensors in `model`, in place; name, doc string and metadata stay.

    Other models that share the old tensors keep them. Nothing is replaced when one does not fit.

    Args:
        model: a model of the caller's own (:func:`iobs_onnx.passes.load_model` makes one).
        weights: the name of an initializer or of a Constant node's output
            (`Site.initializer`) to the new array, in the stored shape and dtype. The arrays
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
        dtype, shape = old.dtype.numpy(), tuple(old.shape.numpy())
        if array.dtype != dtype or array.shape != shape:
            raise CheckError(
                f"weight {name!r}: expected {dtype} {shape}, got {array.dtype} {array.shape}"
            )
        new = ir.Tensor(
            np.ascontiguousarray(array),
            dtype=old.dtype,
            name=old.name,
            doc_string=old.doc_string,
            metadata_props=dict(old.metadata_props),
        )
        exchanges.append((slot, new))
    for slot, tensor in exchanges:
        slot.put(tensor)
