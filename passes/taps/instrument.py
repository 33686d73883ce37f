"""Take a part out of a graph: from given values to the activations asked for."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

import onnx_ir as ir

from iobs_onnx.errors import ModelError
from iobs_onnx.passes.graph import walk

# ONNX element type (a number of TensorProto.DataType) and rank of a value.
Kind: TypeAlias = tuple[int, int]


def instrument(
    model: ir.Model, values: Iterable[str], given: Mapping[str, Kind] | None = None
) -> ir.Model:
    """Return a new model whose outputs are exactly the named activations, in the order given.

    Nodes, initializers and graph inputs that they do not need are left out. Outputs keep the type
    and shape known in `model`, which may be none: ONNX Runtime infers them.

    Args:
        model: unchanged; its tensors are shared with the result.
        values: names of node outputs or graph inputs of the main graph; doubles are dropped.
        given: values of the main graph that become inputs instead of being computed, and what
            they are.

    Raises:
        ModelError: a name is not a value of the main graph.
    """
    graph = model.graph
    known = {value.name: value for value in graph.inputs}
    known.update((value.name, value) for node in graph for value in node.outputs if value.name)
    names = list(dict.fromkeys(values))
    cuts = given or {}
    for name in (*names, *cuts):
        if name not in known:
            raise ModelError(f"activation {name!r}: the main graph has no such value")
    outputs = [known[name] for name in names]
    cut = dict.fromkeys(known[name] for name in cuts)
    nodes, read = _needed(graph, outputs, cut)
    own = [value for value in graph.inputs if value in read]
    inner = [value for value in cut if value in read and not value.is_graph_input()]
    view = ir.GraphView(
        [*own, *inner],
        outputs,
        nodes=nodes,
        initializers=[value for value in graph.initializers.values() if value in read],
        doc_string=graph.doc_string,
        opset_imports=graph.opset_imports,
        name=graph.name,
        metadata_props=dict(graph.metadata_props),
    )
    view.meta.update(graph.meta)
    part = view.clone()
    for value in part.inputs[len(own) :]:
        dtype, rank = cuts[value.name or ""]
        value.type = ir.TensorType(ir.DataType(dtype))
        value.shape = ir.Shape([None] * rank)
    return ir.Model(
        part,
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


def _needed(
    graph: ir.Graph, outputs: list[ir.Value], cut: Collection[ir.Value]
) -> tuple[list[ir.Node], set[ir.Value]]:
    """Return the nodes between `cut` and `outputs`, in graph order, and all values they read."""
    read = set(outputs)
    nodes: list[ir.Node] = []
    for node in reversed(graph):
        if all(value in cut or value not in read for value in node.outputs):
            continue
        nodes.append(node)
        read.update(walk.read_values(node))
    return nodes[::-1], read
