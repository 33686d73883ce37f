"""What a site's output meets next: the bias added to it, and the stream it is added to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.passes.edit.rewrite import as_tensor
from iobs_onnx.passes.graph import names
from iobs_onnx.passes.graph.tensors import stored_slot, stored_tensor
from iobs_onnx.passes.ops import Product, product_of
from iobs_onnx.passes.ops.use import optional
from iobs_onnx.passes.sites import readers
from iobs_onnx.site import Patches, Rows, Site, Tap

# A normalisation of com.microsoft that adds its first two inputs before.
_ADDS_AND_NORMALISES = frozenset({"SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})


@dataclass(frozen=True)
class Surroundings:
    """What follows one site.

    Attributes:
        bias: name of the stored vector that is added to the output, None without one.
        residual: the activation that the output, with its bias, is only added to; its rows are
            those of the site's tap. None without one.
    """

    bias: str | None = None
    residual: Tap | None = None


def find_surroundings(model: ir.Model, sites: Sequence[Site]) -> dict[Site, Surroundings]:
    """Return what follows each site that one plain product multiplies by.

    Sites of which nothing is known are left out: several nodes, operators without a
    :class:`~iobs_onnx.passes.ops.Product`, scaled products, and those in bodies.

    Args:
        model: unchanged.
        sites: from :func:`iobs_onnx.passes.sites.find_sites` of this model.
    """
    nodes = {names.node_reference(node): node for node in model.graph}
    found = {}
    for site in sites:
        node = nodes.get(site.nodes[0])  # None in a body
        if node is not None and len(site.nodes) == 1 and (product := _plain(node, site)):
            found[site] = _surroundings(node, product, site)
    return found


def rewrite_biases(
    model: ir.Model, biases: Mapping[Site, NDArray[np.generic] | ir.TensorProtocol]
) -> None:
    """Exchange biases, in place; a tensor that others read too stays, and the site gets its own.

    Args:
        model: a model of the caller's own.
        biases: site to the new values of its bias, in stored shape and dtype.
    """
    graph = model.graph
    nodes = {names.node_reference(node): node for node in graph}
    for site, values in biases.items():
        node = nodes[site.nodes[0]]
        product = product_of(node, len(site.shape))
        adder, index = (product and _bias_operand(node, product, site)) or (None, 0)
        assert adder is not None, "only sites with a bias get a new one"
        value = adder.inputs[index]
        assert value is not None
        slot = stored_slot(value)
        assert slot is not None
        tensor = as_tensor(values, slot.tensor)
        if len(value.uses()) == 1 and not value.is_graph_output():
            slot.put(tensor)
            continue
        own = f"{site.name}.bias"
        while own in graph.initializers:
            own += "_"
        tensor.name = own
        fresh = ir.Value(
            name=own,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        graph.register_initializer(fresh)
        adder.replace_input_with(index, fresh)


def _plain(node: ir.Node, site: Site) -> Product | None:
    """Return the node if its output is the weight times the tap's rows, and a bias; else None."""
    product = product_of(node, len(site.shape))
    if product is None or product.scaled or site.groups != 1:
        return None
    if product.stacks and (len(site.shape) != product.rank or site.view is not None):
        return None  # a stack of matrices, perhaps
    weight, form = optional(node, 1), site.taps[0].form
    if weight is None or readers.stored_source(weight).name != site.initializer:
        return None
    return product if form == Rows(-1) or isinstance(form, Patches) else None


def _bias_operand(node: ir.Node, product: Product, site: Site) -> tuple[ir.Node, int] | None:
    """Return the node and the input at which the site's bias is added."""
    places = []
    if product.bias is not None:
        places = [(node, product.bias)]
    elif (adder := _only_reader(node.outputs[0])) is not None and adder.op_type == "Add":
        places = [(adder, index) for index in range(2)]
    for reader, index in places:
        value = optional(reader, index)
        slot = None if value is None or value.graph is not node.graph else stored_slot(value)
        # Leading axes of length 1 may stand before the outputs.
        shape = () if slot is None else tuple(slot.tensor.shape.numpy())
        if shape[-1:] == (site.out_features,) == (math.prod(shape),):
            return reader, index
    return None


def _surroundings(node: ir.Node, product: Product, site: Site) -> Surroundings:
    place = _bias_operand(node, product, site)
    bias = None if place is None else place[0].inputs[place[1]]
    output = node.outputs[0] if place is None else place[0].outputs[0]
    return Surroundings(None if bias is None else bias.name, _residual(output, site))


def _residual(output: ir.Value, site: Site) -> Tap | None:
    adder = _only_reader(output, "com.microsoft")
    if adder is None or adder.op_type not in ("Add", *_ADDS_AND_NORMALISES):
        return None
    if not any(value is output for value in adder.inputs[:2]):
        return None
    other = optional(adder, 1 if adder.inputs[0] is output else 0)
    if other is None or other is output or stored_tensor(other) is not None:
        return None
    form = site.taps[0].form
    if isinstance(form, Patches):
        ones = (1,) * len(form.kernel)
        form = Patches(ones, ones, ones, (0,) * 2 * len(ones))
    return Tap(other.name or "", form, site.out_features)


def _only_reader(value: ir.Value, *domains: str) -> ir.Node | None:
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.domain not in ("", *domains):
        return None
    return uses[0].node
