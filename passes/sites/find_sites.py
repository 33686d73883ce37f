"""Find every weight that can be pruned, and say of every other why not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from iobs_onnx.passes.graph import names, walk
from iobs_onnx.passes.graph.layout import Layout
from iobs_onnx.passes.graph.tensors import Slot, stored_slots, stored_tensor
from iobs_onnx.passes.graph.unfold import unfolded
from iobs_onnx.passes.ops import OP_HANDLERS, Use, unsupported, weight_operands
from iobs_onnx.passes.sites import readers
from iobs_onnx.passes.sites.candidates import PRUNABLE_DTYPES, Candidate, find_candidates
from iobs_onnx.passes.sites.out_of_reach import out_of_reach
from iobs_onnx.passes.sites.value_preserving import INTEGERS, Path
from iobs_onnx.passes.taps.bodies import Bodies
from iobs_onnx.site import Candidates, Declined, Routed, Site, Stacked, Tap
from iobs_onnx.site.grid import Packed, Quantized


@dataclass(frozen=True)
class _Known:
    """A model, what is computed from constants alone in it, and what nobody can compute."""

    model: ir.Model
    bodies: Bodies
    constant: set[ir.Value]
    out_of_reach: dict[ir.Value, str]


@dataclass(frozen=True)
class _Uses:
    """How the nodes of a site multiply by its tensor, and what its integers stand for."""

    described: list[tuple[ir.Node, Use]]
    quantized: Quantized | Packed | None


_WANTED = "only floats, and integers behind DequantizeLinear, are pruned"


def find_sites(model: ir.Model) -> Candidates:
    """Return the sites and the declined candidates of a model, each in graph order.

    A candidate is a constant operand of an operator that multiplies by weights. A weight that
    several nodes read becomes one site when all of them multiply by it in one orientation.
    Only shapes, dtypes and quantization scales are read: no weight is loaded. Time is linear in
    the graph's size. A tap may name a value that :mod:`iobs_onnx.passes.taps.expose` has yet to
    make.
    Model-local functions are unfolded first: weights that are passed to them are found too.

    Args:
        model: unchanged by this call.

    Raises:
        ModelError: for a node that lacks an input which its operator requires.
    """
    stored = stored_slots(model)
    model = unfolded(model) if model.functions else model
    constant = walk.constant_values(model.graph)
    for function in model.functions.values():
        constant |= walk.constant_values(function)
    known = _Known(model, Bodies.of(model), constant, out_of_reach(model))
    unique = names.UniqueNames()
    sites: list[Site] = []
    declined: list[Declined] = []
    for candidate in find_candidates(model, constant):
        verdict = _judge(candidate, known)
        source = verdict[0] if isinstance(verdict, tuple) else candidate.source
        name = unique.claim(names.site_name(source, next(iter(candidate.nodes))))
        if isinstance(verdict, tuple):
            declined.append(_declined(name, candidate, *verdict))
        elif (reason := _elsewhere(source, stored, sites)) is not None:
            declined.append(_declined(name, candidate, source, reason))
        else:
            sites.append(_site(name, candidate, verdict, known.bodies))
    return Candidates(tuple(sites), tuple(declined))


def _judge(candidate: Candidate, known: _Known) -> _Uses | tuple[ir.Value, str]:
    """Return how each node multiplies by the tensor, or the stored tensor and a reason."""
    source = candidate.source
    tensor = stored_tensor(source)
    if tensor is None:
        return _behind(source)
    if source.graph is not known.model.graph and source.graph not in known.bodies.runners:
        return source, candidate.place
    if tensor.dtype not in PRUNABLE_DTYPES | INTEGERS:
        # The operator is the better reason where its dtype follows from it.
        for node in candidate.nodes:
            if (reason := unsupported(node)) is not None:
                return source, reason
        return source, f"dtype {tensor.dtype.name}: {_WANTED}"
    if 0 in tensor.shape.numpy():
        return source, "empty tensor"
    uses = _uses(source, tensor, known)
    return (source, uses) if isinstance(uses, str) else uses


def _elsewhere(source: ir.Value, stored: Mapping[str, Slot], sites: list[Site]) -> str | None:
    """Say why a weight of the unfolded model cannot be exchanged in the model by its name."""
    slot = stored.get(source.name or "")
    if slot is None:
        return "inside a model-local function: inline the functions first (onnx.inliner)"
    twice = slot.tensor is not stored_tensor(source)
    if twice or any(site.initializer == source.name for site in sites):
        return "another body stores a tensor of the same name: rename one"
    return None


def _behind(source: ir.Value) -> tuple[ir.Value, str]:
    """Return the first tensor behind an operand computed from constants, and the reason."""
    producer = source.producer()
    assert producer is not None, "only node outputs are computed"
    while stored_tensor(source) is None and (node := source.producer()) is not None:
        inner = next((value for value in node.inputs if value is not None), None)
        if inner is None:
            break
        source = inner
    return source, f"behind {producer.op_type}"


def _uses(source: ir.Value, tensor: ir.TensorProtocol, known: _Known) -> _Uses | str:
    """Describe every reader by the layout of the stored tensor, or say what forbids pruning."""
    found = list(readers.readings(source, tensor))
    uses: list[tuple[ir.Node, Use]] = []
    grids: dict[Quantized | Packed | None, None] = {}
    for reading in found:
        if (reason := _foreign(reading, known)) is not None:
            return reason
        node = reading.node
        assert node is not None, "the graph itself is a foreign reader"
        assert isinstance(reading.path, Path), "a node that cannot be followed is a foreign reader"
        use = _use(node, reading.index, reading.path)
        if isinstance(use, Use):
            use = _untapped(node, use, known) or use
        if isinstance(use, str):
            return use if len(found) == 1 else f"shared, and at {_called(node)}: {use}"
        uses.append((node, use))
        grids[use.quantized or reading.path.quantized] = None
    first_node, first = uses[0]
    for node, use in uses:
        if use.matrices.simplest() != first.matrices.simplest():
            return f"shared in two orientations, by {_called(first_node)} and {_called(node)}"
    if len(grids) > 1:
        return "dequantized in two ways"
    return _Uses(uses, *grids)


def _use(node: ir.Node, index: int, path: Path) -> Use | str:
    if (reason := unsupported(node)) is not None:
        return reason
    handler = OP_HANDLERS[node.domain, node.op_type]
    if (path.integer or path.grid is not None) != handler.packed:
        return f"an integer at the node that multiplies by it: {_WANTED}"
    use = handler.describe(node, index, path.layout)
    if isinstance(use, str):
        return use
    if path.picked is not None:
        return _routed(use, path.picked, path)
    return _misplaced(node, use, path) or use


def _routed(use: Use, index: ir.Value, path: Path) -> Use | str:
    """Return a use of matrices that an index picks from a stack, one for each row."""
    (read,) = use.reads
    form = read.form
    # The stack's axis must be the operand's first still, and the activation's too.
    first = path.layout.axes[0]
    whole = first == Layout.of(path.stored).axes[0] == use.matrices.axes[0]
    if not isinstance(form, Stacked) or len(form.batch) != 1 or not whole:
        return "picked from a stack, where not every row meets a matrix of its own"
    count, (along,), (feature,) = path.stored[0], form.batch, form.features
    return Use((replace(read, form=Routed(feature, along, count, index.name or "")),), use.matrices)


def _misplaced(node: ir.Node, use: Use, path: Path) -> str | None:
    """Say why a weight in another order than the stored one cannot be pruned, or None.

    The order of outputs means nothing to a product, but a bias would have to follow.
    """
    if path.regrouped is None:
        return None
    # Factors that share strides hold parts of one axis.
    turned = any(
        max(stride, moved) < min(stride * size, moved * count)
        for size, stride in use.matrices.axes[2]
        for count, moved in path.regrouped
    )
    fits = OP_HANDLERS[node.domain, node.op_type].free_outputs and not turned
    return None if fits else "behind Concat, which puts its parts in another order"


def _untapped(node: ir.Node, use: Use, known: _Known) -> str | None:
    """Say why the activations that meet the weight cannot be measured; None where they can."""
    first = use.reads[0].value
    if first.is_initializer() or first in known.constant:
        return "both operands are constant"
    if isinstance(use.reads[0].form, Routed) and node.graph is not known.model.graph:
        return "picked from a stack inside a body"
    faults = (known.out_of_reach.get(value) for value in node.outputs)
    if (fault := next(filter(None, faults), None)) is not None:
        return f"behind {fault}, an operator that ONNX Runtime does not know"
    return next(filter(None, (known.bodies.misread(r, node.graph) for r in use.reads)), None)


def _foreign(reading: readers.Reading, known: _Known) -> str | None:
    """Say who else needs the tensor as it is; None for a reader that multiplies by it."""
    node = reading.node
    if node is None:
        return f"also a graph output, {reading.value.name!r}"
    if isinstance(reading.path, str):
        return reading.path
    if (reason := known.bodies.stuck(node.graph)) is not None:
        return reason
    if node.op_identifier() in known.model.functions:
        return (
            f"passed to the model-local function {node.op_type}: "
            "inline the functions first (onnx.inliner)"
        )
    return None if reading.index in weight_operands(node) else f"also read by {_called(node)}"


def _site(name: str, candidate: Candidate, uses: _Uses, bodies: Bodies) -> Site:
    tensor = stored_tensor(candidate.source)
    assert tensor is not None, "a site has a stored tensor"
    shape = tuple(tensor.shape.numpy())
    matrices = uses.described[0][1].matrices
    groups, outputs, inputs = matrices.shape
    view, perm = matrices.view()
    # A dict drops equal taps and keeps their order.
    taps = {
        Tap(bodies.label(read.tap, node.graph), read.form, inputs): None
        for node, use in uses.described
        for read in use.reads
    }
    return Site(
        name=name,
        nodes=tuple(names.node_reference(node) for node in candidate.nodes),
        op_type=_op_types(candidate),
        initializer=candidate.source.name or "",
        shape=shape,
        dtype=tensor.dtype.name,
        axis=_grouped_axis(shape, matrices),
        perm=perm,
        groups=groups,
        out_features=outputs,
        in_features=inputs,
        taps=tuple(taps),
        view=None if view == shape else view,
        quantized=uses.quantized,
    )


def _grouped_axis(shape: tuple[int, ...], matrices: Layout) -> int:
    """Return the stored axis in which the last inputs of `W` lie."""
    last = matrices.axes[2][-1:]
    stored = Layout.of(shape).axes
    if last in stored:
        return stored.index(last)
    # A part of an axis: the outermost whose elements are no further apart.
    apart = last[0][1] if last else 1
    return next(axis for axis in range(len(shape)) if math.prod(shape[axis + 1 :]) <= apart)


def _declined(name: str, candidate: Candidate, stored: ir.Value, reason: str) -> Declined:
    tensor = stored_tensor(stored)
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
