"""Activations inside the bodies of If, Loop and Scan, and the way out of them.

A tap is a value of the main graph. So that it can show an activation of a body, the copy of the
model that is instrumented gets one more output at the node that runs the body: of an If the branch
that holds the activation yields it and the other branch nothing; Loop and Scan stack it, step by
step, along a new first axis. An If inside another is left the same way, twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from iobs_onnx.passes.graph import names, walk
from iobs_onnx.passes.ops.use import Read
from iobs_onnx.site import Rows, Stacked

# The oldest opset in which branches may yield tensors of different shapes, and in which Scan has
# no batch axis of its own.
_SINCE = {"If": 11, "Loop": 1, "Scan": 9}


@dataclass(frozen=True)
class Bodies:
    """The bodies in a main graph, at any depth.

    Attributes:
        opset: of the model.
        runners: each body to the node that runs it, and the name of the attribute that holds it.
    """

    opset: int
    runners: dict[ir.Graph, tuple[ir.Node, str]]

    @staticmethod
    def of(model: ir.Model) -> Bodies:
        """Find them all, without those of model-local functions."""
        runners = {
            body: (node, name)
            for node in model.graph.all_nodes()
            for name, body in walk.named_subgraphs(node)
        }
        return Bodies(model.opset_imports.get("", 1), runners)

    def label(self, name: str, graph: object) -> str:
        """Name a value as a graph meets it; values of the main graph keep their names."""
        while isinstance(graph, ir.Graph) and graph in self.runners:
            node, attribute = self.runners[graph]
            name = f"{names.node_reference(node)}:{attribute}/{name}"
            graph = node.graph
        return name

    def stuck(self, graph: object) -> str | None:
        """Say why activations of a body cannot be brought out; None where they can."""
        depth = 0
        while isinstance(graph, ir.Graph) and graph in self.runners:
            node, _ = self.runners[graph]
            if reason := self._unfit(node, graph, depth):
                return f"inside a body of {node.op_type} {names.node_reference(node)!r}: {reason}"
            graph, depth = node.graph, depth + 1
        return None

    def _unfit(self, node: ir.Node, body: ir.Graph, depth: int) -> str | None:
        if node.domain or node.op_type not in _SINCE:
            return "only those of If, Loop and Scan show their activations"
        if self.opset < (since := _SINCE[node.op_type]):
            return f"{node.op_type} has no outputs of the kind needed before opset {since}"
        if depth and node.op_type != "If":
            return "what a body in it computes need not have the same shape at every step"
        if len(node.outputs) != len(body.outputs) - (node.op_type == "Loop"):
            return "the node leaves out some of its outputs"
        return None

    def stacks(self, graph: object) -> bool:
        """Whether activations of a body come out stacked along a new first axis."""
        runs = isinstance(graph, ir.Graph) and graph in self.runners
        return runs and self.runners[graph][0].op_type != "If"  # type: ignore[index]

    def misread(self, read: Read, graph: object) -> str | None:
        """Say why an activation could not be told apart once it is stacked; None where it can."""
        form = read.form
        if not self.stacks(graph) or not isinstance(form, Rows | Stacked):
            return None
        axes = (form.axis,) if isinstance(form, Rows) else (*form.features, *form.batch)
        deepest = -min(form.batch, default=0) if isinstance(form, Stacked) else 0
        shape = read.value.shape
        if max(axes) >= 0 or (deepest and (shape is None or len(shape) < deepest)):
            return "in a body that runs step by step, the activation's axes cannot be told"
        return None


def bring_out(model: ir.Model, wanted: Collection[str], claim: Callable[[str], str]) -> None:
    """Make activations of bodies values of the main graph, float32, in place.

    Args:
        model: a copy that is never written.
        wanted: names from :meth:`Bodies.label`; others are passed over.
        claim: returns a name that is free, and raises where it is not.
    """
    bodies = Bodies.of(model)
    for body in bodies.runners:
        met = {value: None for node in body for value in (*node.inputs, *node.outputs) if value}
        for value in met:
            name = bodies.label(value.name or "", body)
            if name in wanted:
                _bring_out(bodies, body, value, claim(name))


def _bring_out(bodies: Bodies, body: ir.Graph, value: ir.Value, name: str) -> None:
    # A type that every branch can name: an If wants the same of all.
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, outputs=[_value(f"{name}/0")])
    body.append(cast)
    inner, depth = cast.outputs[0], 0
    while body in bodies.runners:
        node, attribute = bodies.runners[body]
        body.outputs.append(inner)
        for other, branch in walk.named_subgraphs(node):
            if other != attribute:
                branch.outputs.append(_nothing(branch, f"{name}/{depth}/{other}"))
        for listed in ("scan_output_axes", "scan_output_directions"):
            if listed in node.attributes:
                old = node.attributes[listed].as_ints()
                node.attributes[listed] = ir.AttrInt64s(listed, [*old, 0])
        assert isinstance(node.graph, ir.Graph), "functions hold no bodies that are known here"
        body, depth = node.graph, depth + 1
        node.resize_outputs(len(node.outputs) + 1)
        inner = node.outputs[-1]
        inner.name = name if body not in bodies.runners else f"{name}/{depth}"
        inner.type = ir.TensorType(ir.DataType.FLOAT)


def _nothing(body: ir.Graph, name: str) -> ir.Value:
    """Add a tensor without elements to a body."""
    empty = ir.tensor(np.empty(0, np.float32))
    node = ir.node("Constant", [], {"value": empty}, outputs=[_value(name)])
    body.append(node)
    return node.outputs[0]


def _value(name: str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
