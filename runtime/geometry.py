"""Where the kernel of a convolution meets its input: padding, and the size of the output."""

from __future__ import annotations

from collections.abc import Sequence

from iobs_onnx.site import Patches, TransposedPatches


def span(form: Patches | TransposedPatches, axis: int) -> int:
    """Return how many elements a dilated kernel reaches over along a spatial axis."""
    return (form.kernel[axis] - 1) * form.dilations[axis] + 1


def padding(space: Sequence[int], form: Patches) -> list[tuple[int, int]]:
    """Return how many zeros begin and end each spatial axis of an input of this size."""
    rank = len(space)
    if form.auto_pad == "NOTSET":
        return [(form.pads[axis], form.pads[rank + axis]) for axis in range(rank)]
    if form.auto_pad == "VALID":
        return [(0, 0)] * rank
    result = []
    for axis, size in enumerate(space):  # SAME_*: as many outputs as strides fit into the input
        stride = form.strides[axis]
        outputs = -(-size // stride)
        total = max(0, (outputs - 1) * stride + span(form, axis) - size)
        result.append(_shared_out(total, form.auto_pad))
    return result


def output_space(space: Sequence[int], form: Patches) -> tuple[int, ...]:
    """Return the size of a convolution's output along each spatial axis."""
    padded = zip(space, padding(space, form), strict=True)
    return tuple(
        (begin + size + end - span(form, axis)) // form.strides[axis] + 1
        for axis, (size, (begin, end)) in enumerate(padded)
    )


def transposed_padding(space: Sequence[int], form: TransposedPatches) -> list[tuple[int, int]]:
    """Return the padding of a transposed convolution's input once strides have spread it.

    That is how far the kernel reaches beyond each end; less than 0 where the output is cut off.
    """
    rank = len(space)
    result = []
    for axis, size in enumerate(space):
        begin, end = form.pads[axis], form.pads[rank + axis]
        if form.output_shape or form.auto_pad.startswith("SAME"):
            stride = form.strides[axis]
            outputs = form.output_shape[axis] if form.output_shape else size * stride
            reach = (size - 1) * stride + span(form, axis) + form.output_padding[axis]
            begin, end = _shared_out(reach - outputs, form.auto_pad)
        reach = span(form, axis) - 1
        result.append((reach - begin, reach - end + form.output_padding[axis]))
    return result


def _shared_out(total: int, auto_pad: str) -> tuple[int, int]:
    """Cut a total in two; the odd one ends the axis for SAME_UPPER and begins it otherwise."""
    less = total // 2
    return (less, total - less) if auto_pad == "SAME_UPPER" else (total - less, less)
