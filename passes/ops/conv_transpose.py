"""ConvTranspose in one, two or three dimensions, with groups; the weight is `(C, M/g, *kernel)`."""

from __future__ import annotations

import onnx_ir as ir

from iobs_onnx.passes.graph.attributes import integer, integers, text
from iobs_onnx.passes.graph.layout import Layout
from iobs_onnx.passes.ops.conv import ONE_CHANNEL, unfit
from iobs_onnx.passes.ops.use import Handler, Read, Use, operand
from iobs_onnx.site import TransposedPatches


def describe(node: ir.Node, weight: int, layout: Layout) -> Use | str:
    """Read an output position as a product with the inputs that reach it, channels last."""
    if reason := unfit(layout):
        return reason
    channels, _, *kernel = layout.shape
    groups = integer(node, "group", 1)
    if groups < 1 or channels % groups:
        return f"{channels} input channels are not a multiple of {groups} groups"
    if channels == groups:
        return ONE_CHANNEL
    space = len(kernel)
    auto_pad = text(node, "auto_pad", "NOTSET")
    form = TransposedPatches(
        kernel=tuple(kernel),
        strides=integers(node, "strides", [1] * space),
        dilations=integers(node, "dilations", [1] * space),
        pads=(0,) * 2 * space if auto_pad == "VALID" else integers(node, "pads", [0] * 2 * space),
        output_padding=integers(node, "output_padding", [0] * space),
        output_shape=integers(node, "output_shape", [])[-space:],
        auto_pad=auto_pad,
        groups=groups,
    )
    split = layout.split(0, groups)
    assert split is not None, "the number of inputs is a multiple of that of groups"
    return Use((Read(operand(node, 0), form),), split.join((0,), (2,), (*range(3, 3 + space), 1)))


CONV_TRANSPOSE = Handler(
    operands=(1,),
    describe=describe,
    no_kernel="no known engine uses 2:4 weights of transposed convolutions",
)
