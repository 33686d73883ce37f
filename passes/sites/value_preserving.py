"""Operators between a stored tensor and the node that multiplies by it.

Each moves values (Transpose, Reshape, Flatten, Squeeze, Unsqueeze, Identity), picks them (Gather
and GatherND, of the matrices in a stack), rounds them (Cast, a QuantizeLinear with its
DequantizeLinear) or scales them (DequantizeLinear, a Mul after a Cast from integers). None mixes
two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.passes.graph.attributes import integer, integers
from iobs_onnx.passes.graph.layout import Factor, Layout
from iobs_onnx.passes.graph.tensors import constant_array, stored_slot
from iobs_onnx.site.grid import Quantized

INTEGERS = frozenset(
    {
        ir.DataType.INT4,
        ir.DataType.UINT4,
        ir.DataType.INT8,
        ir.DataType.UINT8,
        ir.DataType.INT16,
        ir.DataType.UINT16,
    }
)

_FLOATS = frozenset(dtype.value for dtype in ir.DataType if dtype.is_floating_point())


@dataclass(frozen=True)
class Path:
    """How an operand comes from a stored tensor.

    Attributes:
        stored: the stored tensor's shape.
        layout: where the operand's elements lie in it.
        quantized: what integers stand for; None for floats.
        integer: whether the operand at this point is an integer.
        grid: scale, zero point and axis of a QuantizeLinear that is still to be undone.
        regrouped: the axis whose places stand in another order than the stored one, as factors of
            the stored tensor; None for none.
        picked: what says which matrix of a stack stands at each place of the operand's first axis,
            which is the stack's; None where the operand is the whole stack.
    """

    stored: tuple[int, ...]
    layout: Layout
    quantized: Quantized | None = None
    integer: bool = False
    grid: tuple[object, ...] | None = None
    regrouped: tuple[Factor, ...] | None = None
    picked: ir.Value | None = None

    @classmethod
    def of(cls, tensor: ir.TensorProtocol) -> Path:
        """Return the path of length zero."""
        shape = tuple(tensor.shape.numpy())
        return cls(shape, Layout.of(shape), integer=tensor.dtype in INTEGERS)

    def stored_axis(self, axis: int) -> int | None:
        """Return the axis of the stored tensor that is the operand's `axis`, whole; else None."""
        axes = self.layout.axes
        stored = Layout.of(self.stored).axes
        if not -len(axes) <= axis < len(axes) or axes[axis] not in stored:
            return None
        return stored.index(axes[axis])


def followed_input(node: ir.Node) -> ir.Value | None:
    """Return the input whose values a node passes on; None if the node is not followed."""
    if node.domain != "" or node.op_type not in _STEPS or not node.inputs:
        return None
    if node.op_type == "Mul":
        return next((value for value in node.inputs if _cast_from_integers(value)), None)
    if node.op_type in _PICKS and not _picks(node):
        return None
    return None if node.op_type == "Cast" and not _to_float(node) else node.inputs[0]


def follow(node: ir.Node, index: int, path: Path) -> Path | str | None:
    """Return the path of a node's output given that of its input `index`.

    Returns:
        None for a node that is not followed, and text where it would be but cannot be.
    """
    if followed_input(node) is not node.inputs[index] or (index and node.op_type != "Mul"):
        return None
    return _STEPS[node.op_type](node, path)


def _transposed(node: ir.Node, path: Path) -> Path | None:
    rank = len(path.layout.axes)
    order = integers(node, "perm", list(range(rank - 1, -1, -1)))
    # A Transpose that does not fit its operand is left to the checker of the model.
    if sorted(order) != list(range(rank)):
        return None
    return replace(path, layout=path.layout.transpose(order))


def _reshaped(node: ir.Node, path: Path) -> Path | str:
    shape = _new_shape(node, path.layout.shape)
    if shape is None:
        return f"behind {node.op_type}, whose shape is not constant or does not fit"
    layout = path.layout.reshape(shape)
    if layout is None:
        return f"behind {node.op_type}, which mixes transposed axes"
    return replace(path, layout=layout)


def _new_shape(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    rank = len(shape)
    if node.op_type == "Flatten":
        axis = integer(node, "axis", 1)
        axis += rank if axis < 0 else 0
        return (int(np.prod(shape[:axis])), int(np.prod(shape[axis:])))
    if node.op_type == "Reshape":
        target = constant_array(node.inputs[1] if len(node.inputs) > 1 else None)
        return None if target is None else _resolved(node, _integers(target), shape)
    axes = _axes(node)
    if axes is None:
        return None
    if node.op_type == "Squeeze":
        if not rank:
            return shape
        drop = {axis % rank for axis in axes}
        return tuple(n for i, n in enumerate(shape) if (i not in drop if drop else n != 1))
    total = rank + len(axes)
    added = {axis % total for axis in axes}
    rest = iter(shape)
    return tuple(1 if axis in added else next(rest, 0) for axis in range(total))


def _resolved(node: ir.Node, target: list[int], shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Fill in what Reshape leaves open: 0 for the same length, -1 for the rest."""
    if not integer(node, "allowzero", 0):
        if any(not n and axis >= len(shape) for axis, n in enumerate(target)):
            return None
        target = [n or shape[axis] for axis, n in enumerate(target)]
    if -1 in target:
        known = -int(np.prod(target))
        if known <= 0:
            return None
        target[target.index(-1)] = int(np.prod(shape)) // known
    return tuple(target) if min(target, default=1) > 0 else None


def _axes(node: ir.Node) -> Sequence[int] | None:
    """Axes of Squeeze and Unsqueeze, an attribute before opset 13; empty for all of length 1."""
    if "axes" in node.attributes:
        return integers(node, "axes", [])
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return () if node.op_type == "Squeeze" else None
    array = constant_array(node.inputs[1])
    return None if array is None else _integers(array)


def _integers(array: NDArray[np.generic]) -> list[int]:
    return [int(entry) for entry in array.reshape(-1).astype(np.int64)]


def _picks(node: ir.Node) -> bool:
    """Whether a node picks whole matrices or more of a stack, by numbers that it is given.

    A table of vectors, as of tokens, is looked up and not multiplied by.
    """
    table = node.inputs[0]
    index = node.inputs[1] if len(node.inputs) > 1 else None
    axis = integer(node, "axis", 0) or integer(node, "batch_dims", 0)
    if table is None or index is None or index.shape is None or axis:
        return False
    # GatherND has one axis more, of the numbers that make up one place.
    places = len(index.shape) - (node.op_type == "GatherND")
    alone = node.op_type == "Gather" or index.shape[-1] == 1
    deep = table.shape is not None and len(table.shape) >= 3
    return places == 1 and alone and deep and constant_array(index) is None


def _picked(node: ir.Node, path: Path) -> Path | str:
    if path.picked is not None:
        return f"behind a second {node.op_type}"
    return replace(path, picked=node.inputs[1])


def _cast(node: ir.Node, path: Path) -> Path:
    if not path.integer:
        return path
    return replace(path, quantized=Quantized((1.0,), (0,)), integer=False)


def _quantized(node: ir.Node, path: Path) -> Path | None:
    """Rounding, once the DequantizeLinear that goes with it follows."""
    return None if path.integer or path.grid else replace(path, grid=_grid(node))


def _dequantized(node: ir.Node, path: Path) -> Path | str | None:
    if path.grid is not None:
        same = path.grid == _grid(node)
        return replace(path, grid=None) if same else "behind a second quantization"
    if not path.integer:
        return None
    quantized = _stands_for(node, path)
    if isinstance(quantized, str):
        return f"behind DequantizeLinear, whose {quantized}"
    return replace(path, quantized=quantized, integer=False)


def _stands_for(node: ir.Node, path: Path) -> Quantized | str:
    """Return what a DequantizeLinear makes of integers, or what is wrong with it."""
    scale = constant_array(node.inputs[1] if len(node.inputs) > 1 else None)
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    zeros = np.zeros(1, np.int32) if zero is None else constant_array(zero)
    if scale is None or zeros is None:
        return "scale or zero point is not constant"
    if integer(node, "block_size", 0):
        return "scales vary along blocks of an axis"
    if zeros.size not in (1, scale.size) or not np.isfinite(scale.astype(np.float32)).all():
        return "scale is not finite or does not fit its zero point"
    axis = None
    if scale.size > 1:
        axis = path.stored_axis(integer(node, "axis", 1))
        if axis is None or scale.shape != (path.stored[axis],):
            return "scales do not follow one stored axis"
    return Quantized(
        tuple(float(s) for s in scale.reshape(-1).astype(np.float32)),
        tuple(int(z) for z in np.resize(zeros.astype(np.int32), scale.size)),
        axis,
    )


def _scaled(node: ir.Node, path: Path) -> Path | str:
    """Take the scale of a Mul after a Cast: one number, or a vector along one axis."""
    factor = next((value for value in node.inputs if value is not followed_input(node)), None)
    scale = constant_array(factor)
    rank = len(path.layout.axes)
    if scale is None or scale.ndim > rank or path.quantized is None or not np.isfinite(scale).all():
        return "behind Mul, whose other operand is not a constant scale"
    long = [axis - scale.ndim for axis in range(scale.ndim) if scale.shape[axis] > 1]
    if len(long) > 1:
        return "behind Mul by more than a scale along one axis"
    axis = path.stored_axis(long[0]) if long else None
    if long and (axis is None or path.stored[axis] != scale.size):
        return "behind Mul, whose scales do not follow one stored axis"
    entries = tuple(float(s) for s in scale.reshape(-1).astype(np.float32))
    return replace(path, quantized=Quantized(entries, (0,) * len(entries), axis))


def _grid(node: ir.Node) -> tuple[object, ...]:
    """What a QuantizeLinear and the DequantizeLinear that undoes it have in common."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    blocks = integer(node, "block_size", 0)
    return node.inputs[1], zero, integer(node, "axis", 1), blocks


def _cast_from_integers(value: ir.Value | None) -> bool:
    """Whether a value is a stored tensor of integers cast to floats: a scale is to follow."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Cast" or node.domain != "" or not _to_float(node):
        return False
    slot = None if node.inputs[0] is None else stored_slot(node.inputs[0])
    return slot is not None and slot.tensor.dtype in INTEGERS


def _to_float(node: ir.Node) -> bool:
    target = node.attributes.get("to")
    # In a model-local function the target may be the caller's to say.
    return target is not None and not target.is_ref() and integer(node, "to", 0) in _FLOATS


# Operators that pick parts along the first axis.
_PICKS = frozenset({"Gather", "GatherND"})
_STEPS: dict[str, Callable[[ir.Node, Path], Path | str | None]] = {
    "Cast": _cast,
    "DequantizeLinear": _dequantized,
    "Flatten": _reshaped,
    "Gather": _picked,
    "GatherND": _picked,
    "Identity": lambda node, path: path,
    "Mul": _scaled,
    "QuantizeLinear": _quantized,
    "Reshape": _reshaped,
    "Squeeze": _reshaped,
    "Transpose": _transposed,
    "Unsqueeze": _reshaped,
}
