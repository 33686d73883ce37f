"""Values that taps read and a graph does not have: put into the copy that is instrumented."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from iobs_onnx.errors import ModelError
from iobs_onnx.passes.graph.unfold import unfolded
from iobs_onnx.passes.ops import handler_of
from iobs_onnx.passes.taps.bodies import bring_out
from iobs_onnx.site import Site


def prepare(model: ir.Model, sites: Iterable[Site]) -> ir.Model:
    """Return a copy of a model that has every value that taps of sites read.

    Model-local functions are unfolded, handlers of operators put in what they expose, and
    activations of bodies that sites read become values of the main graph.

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

    for node in [node for scope in graphs for node in scope]:
        if (handler := handler_of(node)) is not None and handler.expose is not None:
            handler.expose(node, claim)
    bring_out(model, {name for site in sites for tap in site.taps for name in tap.values}, claim)
    return model
