"""Einsum of two operands that is a matrix product with a weight, batched or not."""

from __future__ import annotations

import onnx_ir as ir

from iobs_onnx.passes.graph.attributes import text
from iobs_onnx.passes.graph.layout import Layout
from iobs_onnx.passes.ops.use import Handler, Read, Use, operand
from iobs_onnx.site import RowForm, Rows, Stacked


def describe(node: ir.Node, weight: int, layout: Layout) -> Use | str:
    """Sort the weight's labels: summed with the activation, kept from either, or from both."""
    equation = text(node, "equation", "").replace(" ", "")
    if len(node.inputs) != 2:
        return f"Einsum of {len(node.inputs)} operands: only products of two are supported"
    terms = equation.split("->")[0].split(",")
    if len(terms) != 2:
        return f"equation {equation!r} does not name two operands"
    own, other = terms[weight], terms[1 - weight]
    output = equation.split("->")[1] if "->" in equation else _implicit(own, other)
    if reason := _unfit(equation, own, other, output, layout):
        return reason
    batch = [label for label in own if label in other and label in output]
    summed = [label for label in own if label in other and label not in output]
    kept = [label for label in own if label not in other]
    if not summed or not kept:
        return f"equation {equation!r} is not a matrix product with this operand"
    features = tuple(_axis(other, label) for label in summed)
    form: RowForm = Rows(features[0])
    if batch or len(features) > 1:
        sizes = tuple(layout.shape[own.index(label)] for label in batch)
        form = Stacked(features, tuple(_axis(other, label) for label in batch), sizes)
    axes = [[own.index(label) for label in labels] for labels in (batch, kept, summed)]
    return Use((Read(operand(node, 1 - weight), form),), layout.join(*axes))


def _unfit(equation: str, own: str, other: str, output: str, layout: Layout) -> str | None:
    named = other.replace("...", "")
    lengths = dict(zip(own, layout.shape, strict=False))
    reasons = {
        "gives the weight axes without a label": "." in own or len(own) != len(layout.axes),
        "reads a diagonal": len(set(own)) < len(own) or len(set(named)) < len(named),
        "sums an axis of the weight alone": not set(own) <= set(other + output),
        "sums an axis of the activation alone": not set(other) <= set(own + output),
        "repeats a weight axis of length 1": any(lengths.get(label) == 1 for label in named),
    }
    return next((f"equation {equation!r} {text}" for text, holds in reasons.items() if holds), None)


def _axis(term: str, label: str) -> int:
    """Return a label's axis: from the end, or from the front where `...` follows it."""
    place, rest = term.index(label), term[term.index(label) :]
    return place if "..." in rest else -len(rest)


def _implicit(first: str, second: str) -> str:
    """Return the output that an equation without `->` has: labels that occur once, in order."""
    both = (first + second).replace("...", "")
    labels = "".join(sorted(label for label in both if both.count(label) == 1))
    return ("..." if "..." in first + second else "") + labels


# More than two operands are declined, not passed over.
EINSUM = Handler(operands=(0, 1, 2, 3), describe=describe)
