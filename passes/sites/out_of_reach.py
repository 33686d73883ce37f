"""What depends on operators that ONNX Runtime does not know: custom ones, of other domains."""

from __future__ import annotations

import onnx_ir as ir

from iobs_onnx.passes.graph import walk
from iobs_onnx.passes.graph.unfold import unfolded

# What ONNX Runtime and its builds for other hardware register.
_DOMAINS = ("ai.onnx", "com.microsoft", "com.ms.internal", "org.pytorch")


def out_of_reach(model: ir.Model) -> dict[ir.Value, str]:
    """Return the values that ONNX Runtime cannot compute, each with the operator at fault.

    Args:
        model: unchanged; with its functions unfolded, if they are to be looked into.
    """
    found: dict[ir.Value, str] = {}
    for node in model.graph:
        bodies = [body for outer in walk.subgraphs(node) for body in (outer, *outer.subgraphs())]
        # A node runs with all that it holds, or not at all.
        inner = [node, *(n for body in bodies for n in body)]
        custom = (f"{n.domain}::{n.op_type}" for n in inner if _is_custom(n, model))
        fault = next(custom, None) or next(filter(None, map(found.get, walk.read_values(node))), "")
        if fault:
            made = [value for n in inner for value in n.outputs]
            made += [value for body in bodies for value in body.inputs]
            found |= dict.fromkeys(made, fault)
    return found


def outputs_out_of_reach(model: ir.Model) -> dict[str, str]:
    """Return the names of outputs that ONNX Runtime cannot compute, each with the operator."""
    model = unfolded(model) if model.functions else model
    faults = out_of_reach(model)
    return {value.name or "": faults[value] for value in model.graph.outputs if value in faults}


def _is_custom(node: ir.Node, model: ir.Model) -> bool:
    known = not node.domain or node.domain.startswith(_DOMAINS)
    return not known and node.op_identifier() not in model.functions
