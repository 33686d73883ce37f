"""Where a model holds tensors, and how one is exchanged for another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.errors import ModelError
from iobs_onnx.passes.graph.attributes import integers


@dataclass(frozen=True)
class Slot:
    """A place that holds one tensor: an initializer, or an attribute of a node.

    Attributes:
        value: the initializer, or the node's first output.
        attribute: name of the attribute of `value`'s producer; None for an initializer.
    """

    value: ir.Value
    attribute: str | None = None

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The tensor held now."""
        if self.attribute is None:
            tensor = self.value.const_value
            assert tensor is not None, "slots are made of values that have a tensor"
            return tensor
        return self._node().attributes[self.attribute].as_tensor()

    def put(self, tensor: ir.TensorProtocol) -> None:
        """Hold `tensor` instead; other models that share the old one are not affected."""
        if self.attribute is None:
            self.value.const_value = tensor
            return
        if isinstance(tensor, ir.ExternalTensor):
            # ONNX keeps external data for initializers only.
            (tensor,) = ir.external_data.convert_tensors_from_external([tensor])
        node = self._node()
        old = node.attributes[self.attribute]
        node.attributes[self.attribute] = ir.AttrTensor(
            self.attribute, tensor, doc_string=old.doc_string
        )

    def _node(self) -> ir.Node:
        node = self.value.producer()
        assert node is not None, "an attribute belongs to a node"
        return node


def slots(model: ir.Model) -> list[Slot]:
    """Return all places of a model that hold a tensor: bodies and functions included."""
    return [
        *(
            Slot(value)
            for graph in model.graphs()
            for value in graph.initializers.values()
            if value.const_value is not None
        ),
        *(
            Slot(node.outputs[0], name)
            for node in all_nodes(model)
            for name, attribute in node.attributes.items()
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref()
        ),
    ]


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every node of a model: main graph, bodies and model-local functions."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def stored_slot(value: ir.Value) -> Slot | None:
    """Return where an initializer or a Constant node's output is stored; None for others."""
    if value.is_initializer():
        return Slot(value) if value.const_value is not None else None
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain != "":
        return None
    attribute = node.attributes.get("value")
    return None if attribute is None or attribute.is_ref() else Slot(value, "value")


def stored_tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or of a Constant node's `value`, else None."""
    slot = stored_slot(value)
    return None if slot is None else slot.tensor


def constant_array(value: ir.Value | None) -> NDArray[np.generic] | None:
    """Return the numbers a value always is; None where it is absent, computed, overridable or text.

    Raises:
        ModelError: its tensor cannot be read.
    """
    if value is None or value.is_graph_input():
        return None
    slot = stored_slot(value)
    if slot is not None:
        try:
            array = slot.tensor.numpy()
        except (OSError, ValueError) as error:
            raise ModelError(f"tensor {value.name!r} cannot be read: {error}") from error
        return None if slot.tensor.dtype == ir.DataType.STRING else array
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain != "":
        return None
    if "value_ints" in node.attributes:
        return np.array(integers(node, "value_ints", []), np.int64)
    return None


def stored_slots(model: ir.Model) -> dict[str, Slot]:
    """Return stored tensors by the name of their value (`Site.initializer`), bodies included.

    Bodies beside each other may use one name twice; the first has it then, the main graph before
    all bodies.
    """
    found: dict[str, Slot] = {}
    for graph in (model.graph, *model.graph.subgraphs()):
        constants = (node.outputs[0] for node in graph if node.op_type == "Constant")
        for value in (*graph.initializers.values(), *constants):
            if (slot := stored_slot(value)) is not None:
                found.setdefault(value.name or "", slot)
    return found


def release(model: ir.Model, names: Iterable[str]) -> None:
    """Unmap external tensors of the main graph; they are mapped again when they are read."""
    stored = model.graph.initializers
    for name in names:
        tensor = stored[name].const_value if name in stored else None
        if isinstance(tensor, ir.ExternalTensor):
            # A view that is still held keeps the old mapping until it goes.
            with suppress(BufferError):
                tensor.release()
