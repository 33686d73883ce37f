"""The size of an attention head, where an input that caches keys or values leaves it open."""

from __future__ import annotations

import onnx_ir as ir

_MS = "com.microsoft"
# Where these operators take past keys and values.
_PAST = {(_MS, "GroupQueryAttention"): (3, 4), (_MS, "MultiHeadAttention"): (6, 7)}


def head_size(past: ir.Value) -> int | None:
    """Return the last length of a cache `(batch, heads, past, size)`; None where nothing says it.

    ONNX Runtime GenAI's builder writes a symbol in its place. It follows from what new keys or
    values are joined to the cache, or from the queries of the attention that reads it.
    """
    return next(filter(None, (_size(node, index) for node, index in past.uses())), None)


def _size(node: ir.Node, index: int) -> int | None:
    if (node.domain, node.op_type) == ("", "Concat"):
        return next(filter(None, map(_width, node.inputs)), None)
    if index not in _PAST.get((node.domain, node.op_type), ()):
        return None
    heads = node.attributes.get_int("num_heads", 0)
    if node.inputs[1] is None:  # queries, keys and values lie side by side in the first input
        heads += 2 * node.attributes.get_int("kv_num_heads", heads)
    queries = node.inputs[0]
    if queries is None or queries.shape is None or len(queries.shape) != 3:
        return None
    width = _width(queries)
    return width // heads if width and heads and width % heads == 0 else None


def _width(value: ir.Value | None) -> int | None:
    """Return the last length of a value, None where it is not known."""
    last = value.shape[-1] if value is not None and value.shape else None
    return last if isinstance(last, int) else None
