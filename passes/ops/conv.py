"""Conv in one, two or three dimensions, with groups; the weight is `(M, C/g, *kernel)`."""

from __future__ import annotations

import onnx_ir as ir

from iobs_onnx.passes.ops.use import Handler, Use, operand
from iobs_onnx.site import Patches


def describe(node: ir.Node, weight: int, shape: tuple[int, ...]) -> Use | str:
    """Read the convolution as a product with patches, input channels last."""
    if not 3 <= len(shape) <= 5:
        return f"{len(shape)}-D weight: only 1-D, 2-D and 3-D convolutions are supported"
    outputs, channels, *kernel = shape
    groups = node.attributes.get_int("group", 1)
    if channels == 1:
        return (
            "one input channel for each filter (depthwise when grouped): "
            "no input channels to choose among"
        )
    if outputs % groups:
        return f"{outputs} output channels are not a multiple of {groups} groups"
    space = len(kernel)
    auto_pad = node.attributes.get_string("auto_pad", "NOTSET")
    pads = [0] * 2 * space if auto_pad == "VALID" else node.attributes.get_ints("pads")
    form = Patches(
        kernel=tuple(kernel),
        strides=tuple(node.attributes.get_ints("strides", [1] * space)),
        dilations=tuple(node.attributes.get_ints("dilations", [1] * space)),
        pads=tuple(pads or [0] * 2 * space),
        auto_pad=auto_pad,
        groups=groups,
    )
    perm = (0, *range(2, len(shape)), 1)
    return Use(operand(node, 0), form, perm=perm, axis=1, groups=groups)


CONV = Handler(operands=(1,), describe=describe)
