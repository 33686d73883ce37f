"""Values that taps read and a graph does not have: put into the copy that is instrumented."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count

import numpy as np
import onnx_ir as ir

from iobs_onnx.errors import ModelError
from iobs_onnx.passes.graph.unfold import unfolded
from iobs_onnx.passes.ops.recurrent import LENGTHS, RECURRENT, reversed_directions
from iobs_onnx.passes.ops.use import Read, optional
from iobs_onnx.passes.taps.bodies import bring_out
from iobs_onnx.site import Rows, Site


def tap_value(read: Read) -> str:
    """Return the name of the value that a tap reads, which :func:`prepare` may have to make."""
    name = _name(read.value)
    return name if read.padded_by is None else f"{name}/steps of {_name(read.padded_by.outputs[0])}"


def prepare(model: ir.Model, sites: Iterable[Site]) -> ir.Model:
    """Return a copy of a model that has every value that taps of sites read.

    Model-local functions are unfolded. Hidden states that a node leaves out get a name. Where a
    node is given `sequence_lens`, its input and its states get a copy that is zero at the steps
    that no step reads. Activations of bodies that sites read become values of the main graph.

    The copy is for instrumenting, never for writing.

    Raises:
        ModelError: a name is taken by another value.
    """
    model = unfolded(model)
    graphs = (model.graph, *model.graph.subgraphs())
    taken = {value.name for node in model.graph.all_nodes() for value in node.outputs}
    taken.update(value.name for graph in graphs for value in graph.inputs)
    taken.update(name for graph in graphs for name in graph.initializers)

    def claim(name: str) -> str:
        if name in taken:
            raise ModelError(f"value {name!r}: the name is needed for a tap; rename the value")
        taken.add(name)
        return name

    for graph, node in [(scope, node) for scope in graphs for node in scope]:
        if node.op_type not in RECURRENT or node.domain != "" or not node.outputs:
            continue
        states = node.outputs[0]
        if not states.name:
            states.name = claim(_name(states))
        if (given := node.inputs[0]) is None or optional(node, LENGTHS) is None:
            continue
        # (time, batch, input): step t is read where t < length. (time, directions, batch, hidden):
        # forwards, the state after step t is read by step t + 1; backwards, what lies beyond the
        # length is zero already.
        forwards = [0 if backwards else 1 for backwards in reversed_directions(node)]
        reads = ((given, np.zeros((1, 1, 1))), (states, np.reshape(forwards, (1, -1, 1, 1))))
        for value, ahead in reads:
            name = claim(tap_value(Read(value, Rows(-1), node)))
            graph.insert_after(node, _unpadded(node, value, ahead.astype(np.int64), name))
    bring_out(model, {tap.value for site in sites for tap in site.taps}, claim)
    return model


def _name(value: ir.Value) -> str:
    if value.name:
        return value.name
    node = value.producer()
    assert node is not None, "graph inputs and initializers have names"
    named = next((other.name for other in node.outputs if other.name), "")
    return f"{named}/output_{value.index()}"


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
    lengths = add("Cast", node.inputs[LENGTHS], to=ir.DataType.INT64)
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
