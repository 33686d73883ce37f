"""Readable, unique names for sites and nodes."""

from __future__ import annotations

import ast
import re

import onnx_ir as ir

# Where torch's exporter and onnxscript's optimizer leave the names a user knows.
_FOLDED_FROM = "pkg.onnxscript.optimizer.folded_from"
_NAME_SCOPES = "pkg.torch.onnx.name_scopes"

# Names that exporters count up: `onnx::MatMul_331`, `val_90`, `12`, `/fc/Constant_output_0`.
_NUMBERED = re.compile(
    r"(onnx::\w+_\d+|_?(val|const|constant|initializer|tensor|tmp)_?\d*|\d+"
    r"|(.*/)?_?Const(ant)?(_\d+)*(_output_\d+|:\d+)?)"
)


def node_reference(node: ir.Node) -> str:
    """Return a node's name, or that of its first named output where it has none."""
    if node.name:
        return node.name
    return next((value.name for value in node.outputs if value.name), node.op_type)


def site_name(stored: ir.Value, node: ir.Node) -> str:
    """Name the weight `stored`, which `node` multiplies by, as its author would.

    In order: the tensor it was folded from, its own name unless an exporter made that up,
    the module that the node belongs to, the node's own name without the operator.
    """
    if folded := _listed(stored.metadata_props.get(_FOLDED_FROM)):
        return folded[0]
    name = stored.name or ""
    if name and not _NUMBERED.fullmatch(name):
        return name
    # The last scope is the call itself; the one before is the module that makes it.
    scopes = _listed(node.metadata_props.get(_NAME_SCOPES))
    if len(scopes) > 1 and scopes[-2]:
        return scopes[-2]
    return (node.name or "").strip("/").removesuffix(f"/{node.op_type}") or name


class UniqueNames:
    """Hands out names; a name asked for again gets a suffix: `fc`, `fc#2`, `fc#3`."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def claim(self, name: str) -> str:
        """Return `name`, or `name` with the first free suffix."""
        free, count = name, 1
        while free in self._taken:
            count += 1
            free = f"{name}#{count}"
        self._taken.add(free)
        return free


def _listed(text: str | None) -> list[str]:
    """Read the Python list of strings that exporters write into metadata; [] if it is none."""
    if not text:
        return []
    try:
        items = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return []
    return [str(item) for item in items] if isinstance(items, list) else []
