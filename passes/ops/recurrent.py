"""LSTM, GRU and RNN: input weights `W` from X, recurrent weights `R` from the hidden states.

`W` is `(directions, gates * hidden, input)` and `R` `(directions, gates * hidden, hidden)`. The
gates of both are products with one input, `x_t` or `h_(t-1)`, so all gates share a Hessian. The
directions share X, but each has hidden states of its own.
"""

from __future__ import annotations

from itertools import count

import numpy as np
import onnx_ir as ir

from iobs_onnx.passes.graph.attributes import integer, text
from iobs_onnx.passes.graph.layout import Layout
from iobs_onnx.passes.graph.tensors import constant_array, stored_slot
from iobs_onnx.passes.ops.use import Claim, Handler, Read, Use, called_value, operand, optional
from iobs_onnx.site import PreviousStates, Rows, Stacked

# Inputs of all three operators.
_INPUT_WEIGHTS, _LENGTHS, _START = 1, 4, 5
# The oldest opset with Range, which tells steps from padding.
_RANGE = 11


def describe(node: ir.Node, weight: int, layout: Layout) -> Use | str:
    """Read X for W, the states one step before for R."""
    if reason := _unfit(node, layout):
        return reason
    padded_by = None if optional(node, _LENGTHS) is None else node
    if weight == _INPUT_WEIGHTS:
        # Time first: not Rows, to which a padding mask (batch, time) could seem to belong.
        form = Rows(-1) if _batch_first(node) else Stacked((-1,))
        read = Read(operand(node, 0), form, padded_by)
        return Use((read,), layout.join((), (0, 1), (2,)))
    if node.op_type == "GRU" and not integer(node, "linear_before_reset", 0):
        return (
            "GRU with linear_before_reset=0: its hidden gate multiplies R by reset states, "
            "which no tap reads"
        )
    states = PreviousStates(_reversed_directions(node), _batch_first(node))
    reads = [Read(node.outputs[0], states, padded_by)]
    start = optional(node, _START)
    if start is not None and not _is_zero(start):
        if start.is_initializer() and not start.is_graph_input():
            return "initial_h is a stored tensor other than zero: no activation to read"
        batch = (-2 if _batch_first(node) else -3,)
        reads.append(Read(start, Stacked((-1,), batch, (layout.shape[0],))))
    return Use(tuple(reads), layout.join((0,), (1,), (2,)))


def _unfit(node: ir.Node, layout: Layout) -> str | None:
    """Say why no weight of a node can be pruned, or None."""
    if len(layout.axes) != 3:
        return f"{len(layout.axes)}-D weight where {node.op_type} takes three axes"
    if not any(value.name for value in node.outputs):
        return "no output of the node is used"
    if len(_reversed_directions(node)) != layout.shape[0]:
        way = text(node, "direction", "forward")
        return f"direction {way!r} does not fit {layout.shape[0]} matrices"
    if optional(node, _LENGTHS) is not None and (_batch_first(node) or _opset(node) < _RANGE):
        return "sequence_lens is given: supported with layout 0 and opset 11 or later only"
    return None


def _batch_first(node: ir.Node) -> bool:
    return bool(integer(node, "layout", 0))


def _reversed_directions(node: ir.Node) -> tuple[bool, ...]:
    """Say of each direction whether it runs backwards; empty for an unknown one."""
    way = text(node, "direction", "forward")
    known = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
    return known.get(way, ())


def _opset(node: ir.Node) -> int:
    return node.graph.opset_imports.get("", 1) if node.graph is not None else 1


def _is_zero(value: ir.Value) -> bool:
    """Whether a value is a stored tensor of zeros."""
    slot = stored_slot(value)
    array = None if slot is None else constant_array(value)
    return array is not None and not np.any(array)


def expose(node: ir.Node, claim: Claim) -> None:
    """Name the states where the node leaves them out, and copy what it reads without padding.

    Where the node is given `sequence_lens`, its input and its states get a copy that is zero at
    the steps that no step reads.
    """
    if not node.outputs:
        return
    states = node.outputs[0]
    if not states.name:
        states.name = claim(called_value(states))
    if (given := node.inputs[0]) is None or optional(node, _LENGTHS) is None:
        return
    # (time, batch, input): step t is read where t < length. (time, directions, batch, hidden):
    # forwards, the state after step t is read by step t + 1; backwards, what lies beyond the
    # length is zero already.
    forwards = [0 if backwards else 1 for backwards in _reversed_directions(node)]
    reads = ((given, np.zeros((1, 1, 1))), (states, np.reshape(forwards, (1, -1, 1, 1))))
    assert node.graph is not None, "nodes of a model stand in a graph"
    for value, ahead in reads:
        name = claim(Read(value, Rows(-1), node).tap)
        node.graph.insert_after(node, _unpadded(node, value, ahead.astype(np.int64), name))


def _unpadded(node: ir.Node, value: ir.Value, ahead: np.ndarray, name: str) -> list[ir.Node]:
    """Make nodes that give `value`, time first, with zeros where time + `ahead` >= length."""
    nodes: list[ir.Node] = []
    numbers = count()

    def add(op_type: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        output = ir.Value(name=f"{name}/{next(numbers)}")
        nodes.append(ir.node(op_type, inputs, attributes, outputs=[output]))  # type: ignore[arg-type]
        return output

    def constant(array: object) -> ir.Value:
        return add("Constant", value=ir.tensor(np.array(array, np.int64)))

    batch_last = [1] * ahead.ndim
    batch_last[-2] = -1
    duration = add("Gather", add("Shape", value), constant(0))
    times = add("Range", constant(0), duration, constant(1))
    times = add("Reshape", times, constant([-1, *[1] * (ahead.ndim - 1)]))
    times = add("Add", times, constant(ahead))
    lengths = add("Cast", node.inputs[_LENGTHS], to=ir.DataType.INT64)
    lengths = add("Reshape", lengths, constant(batch_last))
    kept = add("Cast", add("Less", times, lengths), to=_dtype(node))
    nodes.append(ir.node("Mul", [value, kept], outputs=[ir.Value(name=name)]))
    return nodes


def _dtype(node: ir.Node) -> ir.DataType:
    """The type that a recurrent node computes in."""
    for value in (*node.inputs[:3], *node.outputs):
        if value is not None and value.dtype is not None:
            return value.dtype
    return ir.DataType.FLOAT


RECURRENT = Handler(
    operands=(1, 2),
    describe=describe,
    expose=expose,
    free_outputs=True,
    no_kernel="no known engine uses 2:4 weights of {op_type}",
)
