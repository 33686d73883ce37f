"""Padding and output sizes against torch's convolutions and ONNX's shape inference."""

from __future__ import annotations

from itertools import product

import onnx
import pytest
import torch
from onnx import helper
from torch.nn.functional import conv2d, pad

from iobs_onnx.runtime.geometry import output_space, padding
from iobs_onnx.site import Patches


def inferred(space: tuple[int, ...], form: Patches) -> tuple[int, ...]:
    attributes = {"strides": form.strides, "dilations": form.dilations, "auto_pad": form.auto_pad}
    if form.auto_pad == "NOTSET":
        attributes["pads"] = form.pads
    node = helper.make_node("Conv", ["x", "w"], ["y"], kernel_shape=form.kernel, **attributes)
    given = {"x": (1, 1, *space), "w": (1, 1, *form.kernel)}
    inputs = [helper.make_tensor_value_info(name, 1, shape) for name, shape in given.items()]
    output = helper.make_tensor_value_info("y", 1, None)
    graph = helper.make_graph([node], "g", inputs, [output])
    shape = onnx.shape_inference.infer_shapes(helper.make_model(graph)).graph.output[0].type
    return tuple(axis.dim_value for axis in shape.tensor_type.shape.dim[2:])


@pytest.mark.parametrize("auto_pad", ["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"])
def test_sizes_of_convolutions(auto_pad: str) -> None:
    axes = product((5, 6, 11), (1, 2, 3), (1, 2, 3), (1, 2))
    for size, kernel, stride, dilation in axes:
        pads = (1, 0, 0, 2) if auto_pad == "NOTSET" else (0,) * 4
        form = Patches((kernel, 2), (stride, 1), (dilation, 1), pads, auto_pad)
        space = (size, 7)
        assert output_space(space, form) == inferred(space, form), (space, form)
        ends = padding(space, form)
        image = pad(torch.zeros(1, 1, *space), [n for pair in reversed(ends) for n in pair])
        found = conv2d(image, torch.zeros(1, 1, kernel, 2), None, form.strides, 0, form.dilations)
        assert tuple(found.shape[2:]) == output_space(space, form)


def test_the_odd_zero_of_same_padding_is_where_its_name_says() -> None:
    upper, lower = (
        padding((4,), Patches((2,), (1,), (1,), (0, 0), auto_pad))
        for auto_pad in ("SAME_UPPER", "SAME_LOWER")
    )
    assert (upper, lower) == ([(0, 1)], [(1, 0)])
