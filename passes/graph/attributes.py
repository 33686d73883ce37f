"""Attributes of nodes, of the type that their operator declares."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from iobs_onnx.errors import ModelError


def integer(node: ir.Node, name: str, default: int) -> int:
    """Return an attribute of one integer.

    Raises:
        ModelError: it is of another type. So for the functions below.
    """
    attribute = _attribute(node, name, ir.AttributeType.INT)
    return default if attribute is None else attribute.as_int()


def integers(node: ir.Node, name: str, default: list[int]) -> tuple[int, ...]:
    """Return an attribute of several integers; an empty one counts as left out."""
    attribute = _attribute(node, name, ir.AttributeType.INTS)
    return tuple((None if attribute is None else attribute.as_ints()) or default)


def text(node: ir.Node, name: str, default: str) -> str:
    """Return an attribute of text."""
    attribute = _attribute(node, name, ir.AttributeType.STRING)
    return default if attribute is None else attribute.as_string()


def _attribute(node: ir.Node, name: str, kind: ir.AttributeType) -> Any:
    attribute = node.attributes.get(name)
    if attribute is None:
        return None
    if attribute.is_ref() or attribute.type != kind:
        found = "a reference" if attribute.is_ref() else attribute.type.name
        raise ModelError(
            f"node {node.name!r}: attribute {name!r} of {node.op_type} is {found} where it takes "
            f"{kind.name}; mend the model"
        )
    return attribute
