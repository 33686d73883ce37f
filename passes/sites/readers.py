"""Where a weight operand is stored, and who else reads the stored tensor.

Weights are followed through operators that move, round or scale values but never mix them
(:mod:`iobs_onnx.passes.sites.value_preserving`), so a zero stored is a zero multiplied by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from iobs_onnx.passes.sites.slice_concat import regrouped
from iobs_onnx.passes.sites.value_preserving import Path, follow, followed_input

# Operators that read a tensor's shape and never its values.
_SHAPE_READERS = frozenset({"Shape", "Size"})


@dataclass(frozen=True)
class Reading:
    """One final reader of a stored tensor, past any operator that is followed.

    `path` says how the operand comes from the stored tensor; text instead of a path is why
    `node`, which would be followed, cannot be. A `node` of None is the graph itself, which
    returns the tensor as an output.
    """

    node: ir.Node | None
    index: int
    path: Path | str
    value: ir.Value


def stored_source(value: ir.Value) -> ir.Value:
    """Walk back from an operand through followed operators; return where that ends."""
    while (node := value.producer()) is not None:
        if (source := followed_input(node)) is None:
            if (turned := regrouped(node)) is None:
                break
            source, _ = turned
        value = source
    return value


def readings(stored: ir.Value, tensor: ir.TensorProtocol) -> Iterator[Reading]:
    """Yield every final reader of the stored tensor `tensor`, in order of discovery."""
    pending = [(stored, Path.of(tensor))]
    joined: set[ir.Node] = set()
    while pending:
        value, path = pending.pop(0)
        if value.is_graph_output():
            yield Reading(None, 0, path, value)
        for node, index in value.uses():
            if node.domain == "" and node.op_type in _SHAPE_READERS:
                continue
            if (found := _joins(value, node)) is not None and not (path.integer or path.grid):
                concat, axis = found
                if concat not in joined:
                    joined.add(concat)
                    turned = replace(path, regrouped=path.layout.axes[axis])
                    pending.append((concat.outputs[0], turned))
                continue
            moved = follow(node, index, path)
            if isinstance(moved, Path):
                pending.append((node.outputs[0], moved))
            else:
                yield Reading(node, index, path if moved is None else moved, value)


def _joins(value: ir.Value, part: ir.Node) -> tuple[ir.Node, int] | None:
    """Return the Concat that puts a value together of `part` and others, and the axis."""
    if part.op_type != "Slice":
        return None
    for concat, _ in part.outputs[0].uses():
        if (turned := regrouped(concat)) is not None and turned[0] is value:
            return concat, turned[1]
    return None
