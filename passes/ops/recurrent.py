"""LSTM, GRU and RNN: input weights `W` from X, recurrent weights `R` from the hidden states.

`W` is `(directions, gates * hidden, input)` and `R` `(directions, gates * hidden, hidden)`. The
gates of both are products with one input, `x_t` or `h_(t-1)`, so all gates share a Hessian. The
directions share X, but each has hidden states of its own.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from iobs_onnx.passes.graph.attributes import integer, text
from iobs_onnx.passes.graph.layout import Layout
from iobs_onnx.passes.graph.tensors import constant_array, stored_slot
from iobs_onnx.passes.ops.use import Handler, Read, Use, operand, optional
from iobs_onnx.site import PreviousStates, Rows, Stacked

RECURRENT = frozenset({"LSTM", "GRU", "RNN"})

# Inputs of all three operators.
_INPUT_WEIGHTS, LENGTHS, _START = 1, 4, 5
# The oldest opset with Range, which tells steps from padding.
_RANGE = 11


def describe(node: ir.Node, weight: int, layout: Layout) -> Use | str:
    """Read X for W, the states one step before for R."""
    if reason := _unfit(node, layout):
        return reason
    padded_by = None if optional(node, LENGTHS) is None else node
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
    states = PreviousStates(reversed_directions(node), _batch_first(node))
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
    if len(reversed_directions(node)) != layout.shape[0]:
        way = text(node, "direction", "forward")
        return f"direction {way!r} does not fit {layout.shape[0]} matrices"
    if optional(node, LENGTHS) is not None and (_batch_first(node) or _opset(node) < _RANGE):
        return "sequence_lens is given: supported with layout 0 and opset 11 or later only"
    return None


def _batch_first(node: ir.Node) -> bool:
    return bool(integer(node, "layout", 0))


def reversed_directions(node: ir.Node) -> tuple[bool, ...]:
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


RECURRENT_WEIGHTS = Handler(operands=(1, 2), describe=describe)
