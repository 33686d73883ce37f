"""Channels that can be reordered: the weights that make them and those that read them.

Let `v` be an activation and `π` an order of its channels. Where every node that makes `v`, or
reads it, treats channels alike (elementwise operators), or holds a weight with one slice for each
channel, the slices of all these weights can be put in the order `π`, and the model computes what
it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.passes.edit.rewrite import rewrite
from iobs_onnx.passes.graph import names
from iobs_onnx.passes.graph.tensors import constant_array, stored_slots, stored_tensor
from iobs_onnx.passes.ops import Product, product_of
from iobs_onnx.passes.ops.use import optional
from iobs_onnx.passes.sites import readers
from iobs_onnx.passes.sites.value_preserving import Path
from iobs_onnx.site import Site

# Each element of the first output depends on one element of each input, broadcast as in NumPy.
_NAMES = """
Abs Add Cast Celu Ceil Clip Cos DequantizeLinear Div Dropout Elu Erf Exp Floor Gelu HardSigmoid
HardSwish Identity LeakyRelu Log Max Mean Min Mish Mul Neg Pow PRelu QuantizeLinear Reciprocal Relu
Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tanh ThresholdedRelu Where
"""
_ELEMENTWISE = frozenset(_NAMES.split())
_ELEMENTWISE_MS = frozenset(("BiasGelu", "FastGelu", "Gelu", "QuickGelu"))
_POOLS = frozenset(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool"))
# Larger constants are not read to see whether all their values are equal.
_VECTOR = 1 << 16


@dataclass(frozen=True)
class Chain:
    """Channels whose order is free.

    Attributes:
        channels: how many there are.
        sites: prunable weights that multiply by them.
        slices: for each stored tensor, its axes that follow the channels.
    """

    channels: int
    sites: tuple[Site, ...]
    slices: tuple[tuple[str, int], ...]


class _Fixed(Exception):
    """The channels' order is not free; the text says why."""


def find_chains(
    model: ir.Model, sites: Sequence[Site]
) -> tuple[tuple[Chain, ...], dict[Site, str]]:
    """Return the chains whose channels the sites read, and for every other site the reason.

    Args:
        model: unchanged; constant vectors of it are read.
        sites: from :func:`iobs_onnx.passes.sites.find_sites` of this model.
    """
    by_weight = {site.initializer: site for site in sites}
    nodes = {names.node_reference(node): node for node in model.graph}
    chains: dict[tuple[tuple[str, int], ...], Chain] = {}
    fixed: dict[tuple[ir.Value, int], str] = {}
    reasons: dict[Site, str] = {}
    for site in sites:
        flood = _Flood(model, site.run)
        try:
            if (node := nodes.get(site.nodes[0])) is None:
                raise _Fixed(f"{site.nodes[0]!r} is inside a body")
            start = _read(node, site)
            if start in fixed:
                raise _Fixed(fixed[start])
            flood.fill(*start)
        except _Fixed as error:
            fixed |= dict.fromkeys(flood.axes.items(), str(error))
            reasons[site] = str(error)
            continue
        slices = tuple(sorted(flood.slices))
        readers = tuple(by_weight[name] for name in flood.readers if name in by_weight)
        chains.setdefault(slices, Chain(site.run, readers, slices))
    return tuple(chains.values()), reasons


def permute_channels(model: ir.Model, chain: Chain, order: NDArray[np.int64]) -> None:
    """Put the channels of a chain in another order, in place; the function stays, to rounding.

    Args:
        model: a model of the caller's own.
        chain: of that model.
        order: channel `i` becomes what channel `order[i]` was.
    """
    for name, axis in chain.slices:
        array = stored_slots(model)[name].tensor.numpy()
        rewrite(model, {name: np.take(array, order, axis=axis)})


def _read(node: ir.Node, site: Site) -> tuple[ir.Value, int]:
    """Return the activation that a site's node reads, and its axis of channels, from the end."""
    weight, value = optional(node, 1), optional(node, 0)
    product = product_of(node, len(site.shape))
    plain = len(site.nodes) == 1 and site.groups == 1 and weight is not None
    stored = None if weight is None else readers.stored_source(weight).name
    if product is None or not plain or stored != site.initializer:
        raise _Fixed(f"{node.op_type} {names.node_reference(node)!r} is not one plain product")
    assert value is not None, "what multiplies by a weight reads an activation"
    return value, product.channels


@dataclass
class _Flood:
    """Spreads from one activation to all whose channels must keep the same order.

    Attributes:
        channels: how many there are.
        axes: activations reached, each with its axis of channels, counted from the end.
        slices: stored tensors and their axes that follow the channels.
        readers: the tensors among them that multiply by the channels.
    """

    model: ir.Model
    channels: int
    axes: dict[ir.Value, int] = field(default_factory=dict)
    slices: dict[tuple[str, int], None] = field(default_factory=dict)
    readers: list[str] = field(default_factory=list)

    def fill(self, value: ir.Value, axis: int) -> None:
        """Reach all; raises _Fixed where the order is not free."""
        pending = [(value, axis)]
        while pending:
            value, axis = pending.pop()
            if self.axes.setdefault(value, axis) != axis:
                raise _Fixed(f"{value.name!r} holds the channels on two axes")
            node = value.producer()
            if node is None or node.graph is not self.model.graph:
                raise _Fixed(f"{value.name!r} comes from outside")
            if value.is_graph_output():
                raise _Fixed(f"{value.name!r} is an output of the model")
            if value.index():
                raise _Fixed(f"{value.name!r} is a further output of {node.op_type}")
            linked = self._made_by(node, axis)
            for reader, index in value.uses():
                linked += self._read_by(reader, index, axis)
            pending += [pair for pair in linked if pair not in self.axes.items()]

    def _made_by(self, node: ir.Node, axis: int) -> list[tuple[ir.Value, int]]:
        """Slice the weight that makes the channels, or go on to where they come from."""
        if (product := _mixing(node, axis)) is not None:
            self._makers(node, product)
            return []
        return self._through(node, 0, axis, node.inputs)

    def _read_by(self, node: ir.Node, index: int, axis: int) -> list[tuple[ir.Value, int]]:
        if node.graph is not self.model.graph:
            raise _Fixed(f"{_called(node)} reads them in a body")
        if node.domain == "" and node.op_type in ("Shape", "Size"):
            return []
        if index == 0 and (product := _mixing(node, axis)) is not None:
            if product.transposed:
                raise _Fixed(f"{_called(node)} reads them transposed")
            self.readers.append(self._slice(node, 1, product.read, rank=product.rank))
            return []
        return self._through(node, index, axis, node.inputs)

    def _through(
        self, node: ir.Node, index: int, axis: int, inputs: Sequence[ir.Value | None]
    ) -> list[tuple[ir.Value, int]]:
        """Pass a node that keeps channels apart; return the activations on its other sides."""
        output = (node.outputs[0], axis)
        first = inputs[0] if inputs else None
        if any(other.uses() for other in node.outputs[1:]):
            raise _Fixed(f"{_called(node)} has further outputs")
        if node.domain == "" and index == 0 and first is not None and axis <= -2:
            # On an axis before the last only convolutions put channels: it is the second.
            if node.op_type in _POOLS:
                return [(first, axis), output]
            if node.op_type == "BatchNormalization":
                self._vectors(node, (1, 2, 3, 4), -1)
                return [(first, axis), output]
            if (product := product_of(node, 1 - axis)) is not None and product.apart:
                self._makers(node, product)
                return [(first, axis), output]
        known = {"": _ELEMENTWISE, "com.microsoft": _ELEMENTWISE_MS}.get(node.domain, frozenset())
        if node.op_type not in known:
            raise _Fixed(f"{_called(node)} mixes or moves channels")
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            scale = constant_array(optional(node, 1))
            if scale is None or scale.size != 1:
                raise _Fixed(f"{_called(node)} has no single scale")
        linked = [output]
        for place, value in enumerate(inputs):
            if value is None or _broadcasts(value, axis):
                continue
            if stored_tensor(readers.stored_source(value)) is not None:
                self._vectors(node, (place,), axis)
            else:
                linked.append((value, axis))
        return linked

    def _makers(self, node: ir.Node, product: Product) -> None:
        """Slice the weight that makes the channels, and its bias."""
        self._slice(node, 1, product.made, rank=product.rank)
        if product.bias is not None:
            self._vectors(node, (product.bias,), -1)

    def _vectors(self, node: ir.Node, places: Sequence[int], axis: int) -> None:
        """Slice constants with one entry for each channel; equal entries need no order."""
        for place in places:
            value = optional(node, place)
            if value is None or _broadcasts(value, axis):
                continue
            tensor = stored_tensor(readers.stored_source(value))
            if tensor is not None and tensor.size <= _VECTOR and len(np.unique(tensor.numpy())) < 2:
                continue
            self._slice(node, place, axis)

    def _slice(self, node: ir.Node, place: int, axis: int, *, rank: int | None = None) -> str:
        """Note that an axis of an operand follows the channels; return the stored tensor's name.

        Raises:
            _Fixed: it cannot be reordered, or does not have the given rank.
        """
        value = optional(node, place)
        source = None if value is None else readers.stored_source(value)
        tensor = None if source is None else stored_tensor(source)
        if source is None or tensor is None or source.is_graph_input():
            raise _Fixed(f"{_called(node)} has no constant at input {place}")
        found = list(readers.readings(source, tensor))
        path = found[0].path
        if len(found) > 1 or source.graph is not self.model.graph:
            raise _Fixed(f"{source.name!r} is read in several places")
        if not isinstance(path, Path) or path.quantized or path.integer or path.grid:
            raise _Fixed(f"{source.name!r} is quantized")
        if path.regrouped is not None:
            raise _Fixed(f"{source.name!r} is put together in another order")
        stored = path.stored_axis(axis)
        fits = rank in (None, len(path.layout.axes))
        if not fits or stored is None or path.stored[stored] != self.channels:
            raise _Fixed(f"{source.name!r} has no axis of {self.channels} channels")
        name = source.name or ""
        self.slices[name, stored] = None
        return name


def _mixing(node: ir.Node, axis: int) -> Product | None:
    """Return a node as a product that makes each channel of all others; None where it is not one.

    Args:
        node: reads or makes the channels.
        axis: where they are.

    Raises:
        _Fixed: the node keeps groups of channels apart.
    """
    product = product_of(node, 1 - axis)
    if product is None or product.channels != axis or product.apart:
        return None
    if product.groups != 1:
        raise _Fixed(f"{_called(node)} has groups")
    return product


def _broadcasts(value: ir.Value, axis: int) -> bool:
    """Whether a value is known to have one entry, or none, along an axis."""
    tensor = stored_tensor(value)
    shape = value.shape if tensor is None else tensor.shape
    return shape is not None and (len(shape) < -axis or shape[axis] == 1)


def _called(node: ir.Node) -> str:
    return f"{node.op_type} {names.node_reference(node)!r}"
