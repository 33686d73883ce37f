"""The size of an attention head that an input leaves open."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from iobs_onnx.runtime import input_specs

FLOAT = TensorProto.FLOAT
PAST = "past_key_values.0.key"


def node(op: str, inputs: list[str], **attributes: int) -> onnx.NodeProto:
    return helper.make_node(op, inputs, ["y"], domain="com.microsoft", **attributes)


ATTENTIONS = {
    "queries": node("GroupQueryAttention", ["q8", "k", "v", PAST], num_heads=2, kv_num_heads=1),
    "packed": node("GroupQueryAttention", ["q16", "", "", PAST], num_heads=2, kv_num_heads=1),
    "multi": node("MultiHeadAttention", ["q8", "k", "v", *[""] * 3, PAST], num_heads=2),
    "joined": helper.make_node("Concat", [PAST, "new"], ["y"], axis=2),
}


def model(attention: onnx.NodeProto) -> ir.Model:
    shapes = {
        "q8": ["b", "s", 8],
        "q16": ["b", "s", 16],
        "k": ["b", "s", 4],
        "v": ["b", "s", 4],
        "new": ["b", 1, "s", 4],
        PAST: ["b", 1, "past", "kv_cache_dim"],
    }
    used = {name: shape for name, shape in shapes.items() if name in attention.input}
    inputs = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in used.items()]
    output = helper.make_tensor_value_info("y", FLOAT, None)
    graph = helper.make_graph([attention], "g", inputs, [output])
    return ir.from_proto(helper.make_model(graph))


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_it_follows_from_what_reads_the_cache(kind: str) -> None:
    (past,) = [spec for spec in input_specs(model(ATTENTIONS[kind])) if spec.cache]
    assert past.shape == (None, 1, None, 4)
    assert past.dtype == np.float32


def test_it_stays_open_where_nothing_says_it() -> None:
    other = helper.make_node("Identity", [PAST], ["y"])
    (past,) = input_specs(model(other))
    assert past.shape == (None, 1, None, None)
