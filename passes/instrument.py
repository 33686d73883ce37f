"""Make activations visible: a graph whose outputs are the activations asked for."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from iobs_onnx.errors import ModelError
from iobs_onnx.passes import trace


def instrument(model: ir.Model, values: Iterable[str]) -> ir.Model:
    """Return a new model whose outputs are exactly the named activations, in the order given.

    Nodes and initializers that they do not need are left out; graph inputs all stay, so that
    the feeds of the model fit, except overridable initializers that are not needed. Outputs
    keep the type and shape known in `model`, which may be none: ONNX Runtime infers them.

    Args:
        model: unchanged; its tensors are shared with the result.
        values: names of node outputs or graph inputs of the main graph; doubles are dropped.

    Raises:
        ModelError: a name is not a value of the main graph.
    """
    graph = model.graph
    known = {value.name: value for value in graph.inputs}
    known.update((value.name, value) for node in graph for value in node.outputs if value.name)
    outputs: list[ir.Value] = []
    for name in dict.fromkeys(values):
        if name not in known:
            raise ModelError(f"activation {name!r}: the main graph has no such value")
        outputs.append(known[name])
    nodes, read = _needed(graph, outputs)
    initializers = [value for value in graph.initializers.values() if value in read]
    view = ir.GraphView(
        [value for value in graph.inputs if value in read or not value.is_initializer()],
        outputs,
        nodes=nodes,
        initializers=initializers,
        doc_string=graph.doc_string,
        opset_imports=graph.opset_imports,
        name=graph.name,
        metadata_props=dict(graph.metadata_props),
    )
    view.meta.update(graph.meta)
    return ir.Model(
        view.clone(),
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        functions=[function.clone() for function in model.functions.values()],
        metadata_props=dict(model.metadata_props),
        device_configurations=model.device_configurations,
    )


def _needed(graph: ir.Graph, outputs: list[ir.Value]) -> tuple[list[ir.Node], set[ir.Value]]:
    """Return the nodes that `outputs` depend on, in graph order, and all values they read."""
    read = set(outputs)
    nodes: list[ir.Node] = []
    for node in reversed(graph):
        if read.isdisjoint(node.outputs):
            continue
        nodes.append(node)
        read.update(value for value in node.inputs if value is not None)
        # A body reads values of the outer graph by name, at any depth.
        for body in trace.subgraphs(node):
            for inner in body.all_nodes():
                read.update(value for value in inner.inputs if value is not None)
    return nodes[::-1], read
