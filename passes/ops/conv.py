"""Conv in one, two or three dimensions, with groups; the weight is `(M, C/g, *kernel)`.

FusedConv adds a tensor and activates the result; NhwcFusedConv also keeps channels last.
"""

from __future__ import annotations

import onnx_ir as ir

from iobs_onnx.passes.graph.attributes import integer, integers, text
from iobs_onnx.passes.graph.layout import Layout
from iobs_onnx.passes.ops.use import Handler, Product, Read, Use, operand, optional
from iobs_onnx.site import Patches


def describe(node: ir.Node, weight: int, layout: Layout) -> Use | str:
    """Read the convolution as a product with patches, input channels last."""
    if reason := unfit(layout):
        return reason
    outputs, channels, *kernel = layout.shape
    groups = integer(node, "group", 1)
    if channels == 1:
        return ONE_CHANNEL
    if groups < 1 or outputs % groups:
        return f"{outputs} output channels are not a multiple of {groups} groups"
    space = len(kernel)
    auto_pad = text(node, "auto_pad", "NOTSET")
    form = Patches(
        kernel=tuple(kernel),
        strides=integers(node, "strides", [1] * space),
        dilations=integers(node, "dilations", [1] * space),
        pads=(0,) * 2 * space if auto_pad == "VALID" else integers(node, "pads", [0] * 2 * space),
        auto_pad=auto_pad,
        groups=groups,
        channels_last=node.op_type == "NhwcFusedConv",
    )
    split = layout.split(0, groups)
    assert split is not None, "the number of outputs is a multiple of that of groups"
    return Use((Read(operand(node, 0), form),), split.join((0,), (1,), (*range(3, 3 + space), 2)))


ONE_CHANNEL = (
    "one input channel for each filter (depthwise when grouped): no input channels to choose among"
)


def unfit(layout: Layout) -> str | None:
    """Say why a weight is not that of a supported convolution, or None."""
    if not 3 <= len(layout.axes) <= 5:
        return f"{len(layout.axes)}-D weight: only 1-D, 2-D and 3-D convolutions are supported"
    return None


def product(node: ir.Node, rank: int) -> Product:
    """Read the channels: second in what is read and made, the weight's first two axes."""
    groups = integer(node, "group", 1)
    return Product(
        channels=1 - rank,
        made=-rank,
        read=1 - rank,
        rank=rank,
        bias=2,
        groups=groups,
        apart=_is_depthwise(node, groups),
    )


def _is_depthwise(node: ir.Node, groups: int) -> bool:
    weight = optional(node, 1)
    if groups == 1 or weight is None or weight.shape is None:
        return False
    return weight.shape[0] == groups and weight.shape[1] == 1


CONV = Handler(operands=(1,), describe=describe, product=product)
# They activate, add a tensor or keep channels last: not plain products.
FUSED_CONV = Handler(operands=(1,), describe=describe)
