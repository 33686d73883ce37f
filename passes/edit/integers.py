"""Store weights as integers with a DequantizeLinear behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.errors import CheckError, ModelError
from iobs_onnx.passes.graph.tensors import Slot, stored_slots
from iobs_onnx.site import Site

# The first opset whose DequantizeLinear has an axis and yields this type.
_NEEDS = {"FLOAT": 13, "FLOAT16": 19, "BFLOAT16": 19}


@dataclass(frozen=True)
class Codes:
    """A weight as integers: `values * scale`, the scale along `axis`.

    Attributes:
        values: int8, in the stored shape.
        scale: `(shape[axis],)`, in the stored type.
        axis: of the stored tensor.
    """

    values: NDArray[np.int8]
    scale: NDArray[np.generic]
    axis: int

    def dequantized(self) -> NDArray[np.generic]:
        """Return what DequantizeLinear makes of it, in the type of the scale."""
        shape = [-1 if axis == self.axis else 1 for axis in range(self.values.ndim)]
        product = self.values.astype(np.float32) * self.scale.astype(np.float32).reshape(shape)
        return product.astype(self.scale.dtype)


def channel_axis(site: Site) -> tuple[int, NDArray[np.intp]] | None:
    """Return the stored axis whose indices are a site's outputs, and which output each one is.

    Outputs are counted over all groups. None where no single axis holds them all: the matrices of
    a batch, heads on an axis of their own.
    """
    count = site.groups * site.out_features
    labels = np.arange(count, dtype=np.float32).reshape(site.groups, site.out_features, 1)
    spread = np.broadcast_to(labels, (site.groups, site.out_features, site.in_features))
    view = site.shape if site.view is None else site.view
    moved = spread.reshape([view[axis] for axis in site.perm])
    stored = moved.transpose(np.argsort(site.perm)).reshape(site.shape)
    for axis, size in enumerate(site.shape):
        rows = np.moveaxis(stored, axis, 0).reshape(size, -1)
        if size == count and (rows == rows[:, :1]).all():
            return axis, rows[:, 0].astype(np.intp)
    return None


def why_not_integers(site: Site) -> str | None:
    """Return why a weight cannot be stored as int8 with one scale an output; None if it can."""
    if site.quantized is not None:
        return f"{site.dtype}: it is stored as integers already"
    if site.dtype not in _NEEDS:
        return f"{site.dtype}: DequantizeLinear does not yield it"
    if channel_axis(site) is None:
        return f"{site.dtype}: its outputs do not lie on one axis"
    return None


def require_opset(model: ir.Model, sites: Iterable[Site]) -> None:
    """Make sure that the model may hold the DequantizeLinear of every site.

    Raises:
        ModelError: its opset is too old.
    """
    opset = model.opset_imports.get("", 0)
    for site in sites:
        needed = 0 if why_not_integers(site) else _NEEDS[site.dtype]
        if opset < needed:
            raise ModelError(
                f"quantize int8: weight {site.initializer!r} ({site.dtype}) needs opset {needed}, "
                f"the model has {opset}: convert it with onnx.version_converter"
            )


def store_as_integers(model: ir.Model, weights: Mapping[str, Codes]) -> dict[str, str]:
    """Exchange stored weights for integers, in place; every reader reads the same numbers.

    Args:
        model: a model of the caller's own.
        weights: name of the stored tensor (`Site.initializer`) to its integers. The weight's name
            goes to the output of the DequantizeLinear; integers and scale are called after it.

    Returns:
        The name of each weight to that of its integers.

    Raises:
        CheckError: there is no such tensor, or its shape differs.
    """
    stored = stored_slots(model)
    taken = {value.name for node in model.graph.all_nodes() for value in node.outputs}
    taken.update(*(graph.initializers for graph in model.graphs()))
    renamed = {}
    for name, codes in weights.items():
        slot = stored.get(name)
        if slot is None or tuple(slot.tensor.shape.numpy()) != codes.values.shape:
            raise CheckError(f"weight {name!r}: no stored tensor of shape {codes.values.shape}")
        quantized, scale = (_fresh(f"{name}_{part}", taken) for part in ("quantized", "scale"))
        _exchange(slot, codes, quantized, scale)
        renamed[name] = quantized
    return renamed


def _exchange(slot: Slot, codes: Codes, quantized: str, scale: str) -> None:
    old = slot.value
    name, tensor, graph = old.name, slot.tensor, old.graph
    assert isinstance(graph, ir.Graph), "weights of functions are declined"
    integers = ir.Value(name=quantized, const_value=ir.Tensor(codes.values, name=quantized))
    # Where names of layers are kept: the weight should be found under the one it had.
    integers.metadata_props.update(old.metadata_props)
    steps = ir.Value(name=scale, const_value=ir.Tensor(codes.scale, dtype=tensor.dtype, name=scale))
    for value in (integers, steps):
        assert value.const_value is not None
        value.shape = ir.Shape(value.const_value.shape.numpy())
        value.dtype = value.const_value.dtype
        graph.register_initializer(value)
    node = ir.node(
        "DequantizeLinear", [integers, steps], {"axis": codes.axis}, name=f"{name}_dequantize"
    )
    out = node.outputs[0]
    out.shape, out.dtype = ir.Shape(tensor.shape.numpy()), tensor.dtype
    producer = old.producer()
    graph.insert_before(next(iter(graph)), node)
    ir.convenience.replace_all_uses_with(old, out)
    if producer is None:
        del graph.initializers[name or ""]
    else:
        graph.remove(producer, safe=True)
    out.name = name


def _fresh(name: str, taken: set[str | None]) -> str:
    """Return `name`, with underscores until it is nobody's, and take it."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name
