"""Models that travel to another process: graphs as messages, weights beside them.

External data of a model stay where they are, and are read from the same path on the other side.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.errors import ModelError
from iobs_onnx.passes.graph.tensors import slots

# Smaller tensors stay in the message.
_LEAST = 1024


@dataclass(frozen=True)
class Shipment:
    """Several models, and the tensors that they share or hold; it can be pickled.

    Attributes:
        graphs: serialized; a large tensor is named by a number, external data by their path.
        arrays: the tensors by these numbers.
    """

    graphs: tuple[bytes, ...]
    arrays: dict[str, NDArray[np.generic]]


def pack(models: Sequence[ir.Model]) -> Shipment:
    """Return models as they can be sent.

    Args:
        models: unchanged. External data of the first are only named; what others do not share with
            it is sent along, wherever it lies.
    """
    named = {
        id(slot.tensor): os.path.abspath(slot.tensor.path)
        for slot in slots(models[0])
        if isinstance(slot.tensor, ir.ExternalTensor)
    }
    arrays: dict[str, NDArray[np.generic]] = {}
    numbers: dict[int, str] = {}
    graphs = []
    for model in models:
        copy = model.clone()
        for slot in slots(copy):
            tensor = slot.tensor
            external = isinstance(tensor, ir.ExternalTensor)
            if slot.attribute is not None or (not external and tensor.nbytes < _LEAST):
                continue
            offset = tensor.offset if isinstance(tensor, ir.ExternalTensor) else 0
            place = named.get(id(tensor))
            if place is None:
                offset, place = 0, numbers.setdefault(id(tensor), str(len(numbers)))
                arrays.setdefault(place, tensor.numpy())
            shape = ir.Shape(tensor.shape.numpy())
            slot.put(
                ir.ExternalTensor(
                    place, offset, tensor.nbytes, tensor.dtype, shape=shape, name=tensor.name or ""
                )
            )
        graphs.append(ir.to_proto(copy).SerializeToString())
    return Shipment(tuple(graphs), arrays)


def unpack(shipment: Shipment) -> list[ir.Model]:
    """Return the models; arrays are shared, and stay those of the shipment.

    Raises:
        ModelError: a file of external data is not at its path.
    """
    models = [ir.from_proto(onnx.ModelProto.FromString(graph)) for graph in shipment.graphs]
    for slot in (slot for model in models for slot in slots(model)):
        tensor = slot.tensor
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        place = os.fspath(tensor.location)
        if place in shipment.arrays:
            name, dtype = tensor.name or "", tensor.dtype
            slot.put(ir.Tensor(shipment.arrays[place], dtype=dtype, name=name))
        elif not os.path.isfile(place):
            raise ModelError(
                f"model data {place}: no such file here; put the model in a folder that all "
                "machines see at the same path"
            )
    return models
