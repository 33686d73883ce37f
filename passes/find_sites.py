"""Find every weight that can be pruned, and say of every other why not."""

from __future__ import annotations

import math

import onnx_ir as ir

from iobs_onnx.passes import names, trace
from iobs_onnx.passes.candidates import PRUNABLE_DTYPES, Candidate, find_candidates
from iobs_onnx.passes.ops import OP_HANDLERS, UNSUPPORTED_OPERANDS, Use
from iobs_onnx.site import Candidates, Declined, Site, Tap


def find_sites(model: ir.Model) -> Candidates:
    """Return the sites and the declined candidates of a model, each in graph order.

    A candidate is a constant operand of an operator that multiplies by weights. A weight that
    several nodes read becomes one site when all of them multiply by it in one orientation.
    Only shapes and dtypes are read: no weight is loaded. Time is linear in the graph's size.

    Args:
        model: unchanged by this call.

    Raises:
        ModelError: for a node that lacks an input which its operator requires.
    """
    constant = trace.constant_values(model.graph)
    for function in model.functions.values():
        constant |= trace.constant_values(function)
    unique = names.UniqueNames()
    sites: list[Site] = []
    declined: list[Declined] = []
    for candidate in find_candidates(model, constant):
        verdict = _judge(candidate, model, constant)
        stored = verdict[0] if isinstance(verdict, tuple) else candidate.source
        name = unique.claim(names.site_name(stored, next(iter(candidate.nodes))))
        if isinstance(verdict, tuple):
            declined.append(_declined(name, candidate, *verdict))
        else:
            sites.append(_site(name, candidate, verdict))
    return Candidates(tuple(sites), tuple(declined))


def _judge(
    candidate: Candidate, model: ir.Model, constant: set[ir.Value]
) -> dict[ir.Node, Use] | tuple[ir.Value, str]:
    """Return how each node multiplies by the tensor, or the stored tensor and a reason."""
    source = candidate.source
    tensor = trace.stored_tensor(source)
    if tensor is None:
        return _behind(source)
    if source.graph is not model.graph:
        return source, candidate.place
    if tensor.dtype not in PRUNABLE_DTYPES:
        # The operator is the better reason where its dtype follows from it.
        for node in candidate.nodes:
            if (node.domain, node.op_type) in UNSUPPORTED_OPERANDS:
                return source, "operator not yet supported"
        return source, f"dtype {tensor.dtype.name}: only floating-point weights are pruned"
    shape = tuple(tensor.shape.numpy())
    if 0 in shape:
        return source, "empty tensor"
    uses = _uses(source, shape, model, constant)
    return (source, uses) if isinstance(uses, str) else uses


def _behind(source: ir.Value) -> tuple[ir.Value, str]:
    """Return the first tensor behind an operand computed from constants, and the reason."""
    producer = source.producer()
    assert producer is not None, "only node outputs are computed"
    while trace.stored_tensor(source) is None and (node := source.producer()) is not None:
        inner = next((value for value in node.inputs if value is not None), None)
        if inner is None:
            break
        source = inner
    return source, f"behind {producer.op_type}"


def _uses(
    source: ir.Value, shape: tuple[int, ...], model: ir.Model, constant: set[ir.Value]
) -> dict[ir.Node, Use] | str:
    """Describe every reader in the axes of the stored tensor, or say what forbids pruning."""
    found = list(trace.readings(source, len(shape)))
    uses: dict[ir.Node, Use] = {}
    for reading in found:
        if (reason := _foreign(reading, model)) is not None:
            return reason
        node = reading.node
        assert node is not None, "the graph itself is a foreign reader"
        use = _use(node, reading, shape)
        if isinstance(use, Use) and (use.activation.is_initializer() or use.activation in constant):
            use = "both operands are constant"
        if isinstance(use, str):
            return use if len(found) == 1 else f"shared, and at {_called(node)}: {use}"
        uses[node] = use
    first_node, first = next(iter(uses.items()))
    for node, use in uses.items():
        if (use.perm, use.axis, use.groups) != (first.perm, first.axis, first.groups):
            return f"shared in two orientations, by {_called(first_node)} and {_called(node)}"
    return uses


def _use(node: ir.Node, reading: trace.Reading, shape: tuple[int, ...]) -> Use | str:
    handler = OP_HANDLERS.get((node.domain, node.op_type))
    if handler is None:
        return "operator not yet supported"
    use = handler.describe(node, reading.index, tuple(shape[axis] for axis in reading.perm))
    if isinstance(use, str):
        return use
    perm = tuple(reading.perm[axis] for axis in use.perm)
    return Use(use.activation, use.form, perm, reading.perm[use.axis], use.groups)


def _foreign(reading: trace.Reading, model: ir.Model) -> str | None:
    """Say who else needs the tensor as it is; None for a reader that multiplies by it."""
    node = reading.node
    if node is None:
        return f"also a graph output, {reading.value.name!r}"
    if node.graph is not model.graph:
        return f"captured by a subgraph, in which {_called(node)} reads it"
    key = (node.domain, node.op_type)
    if node.op_identifier() in model.functions:
        return (
            f"passed to the model-local function {node.op_type}: "
            "inline the functions first (onnx.inliner)"
        )
    handler = OP_HANDLERS.get(key)
    operands = handler.operands if handler else UNSUPPORTED_OPERANDS.get(key, ())
    return None if reading.index in operands else f"also read by {_called(node)}"


def _site(name: str, candidate: Candidate, uses: dict[ir.Node, Use]) -> Site:
    tensor = trace.stored_tensor(candidate.source)
    assert tensor is not None, "a site has a stored tensor"
    shape = tuple(tensor.shape.numpy())
    use = next(iter(uses.values()))
    in_features = math.prod(shape[axis] for axis in use.perm[1:])
    # A dict drops equal taps and keeps their order.
    taps = {Tap(u.activation.name or "", u.form, in_features): None for u in uses.values()}
    return Site(
        name=name,
        nodes=tuple(names.node_reference(node) for node in candidate.nodes),
        op_type=_op_types(candidate),
        initializer=candidate.source.name or "",
        shape=shape,
        dtype=tensor.dtype.name,
        axis=use.axis,
        perm=use.perm,
        groups=use.groups,
        out_features=shape[use.perm[0]] // use.groups,
        in_features=in_features,
        taps=tuple(taps),
    )


def _declined(name: str, candidate: Candidate, stored: ir.Value, reason: str) -> Declined:
    tensor = trace.stored_tensor(stored)
    return Declined(
        name=name,
        nodes=tuple(names.node_reference(node) for node in candidate.nodes),
        op_type=_op_types(candidate),
        initializer=stored.name or "",
        shape=() if tensor is None else tuple(tensor.shape.numpy()),
        reason=reason,
    )


def _op_types(candidate: Candidate) -> str:
    return ", ".join(dict.fromkeys(node.op_type for node in candidate.nodes))


def _called(node: ir.Node) -> str:
    return f"{node.op_type} {names.node_reference(node)!r}"
