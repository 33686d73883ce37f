"""What sites are called, and which of them an engine can use sparse."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from iobs_onnx.passes import eligibility_2_4, find_sites, load_model
from iobs_onnx.passes.graph.names import site_name
from iobs_onnx.site import Candidates

W = np.arange(1, 25, dtype=np.float32).reshape(6, 4)


def node(op_type: str, *names: str, **attributes: object) -> onnx.NodeProto:
    """The last name is the output; the node is called as its output, in capitals."""
    *inputs, output = names
    return helper.make_node(op_type, inputs, [output], name=output.upper(), **attributes)


def found(proto: onnx.ModelProto | Path) -> Candidates:
    return find_sites(load_model(proto))


# ---- names


@pytest.mark.parametrize(
    ("initializer", "node_name", "value_metadata", "node_metadata", "expected"),
    [
        ("val_9", "n", {"pkg.onnxscript.optimizer.folded_from": "['a.weight']"}, {}, "a.weight"),
        ("fc.weight", "/fc/MatMul", {}, {}, "fc.weight"),
        ("layer_12", "/fc/MatMul", {}, {}, "layer_12"),
        ("val_9", "n_1", {}, {"pkg.torch.onnx.name_scopes": "['', 'm', 'm.q', 'l']"}, "m.q"),
        ("val_9", "n_1", {}, {"pkg.torch.onnx.name_scopes": "not a list"}, "n_1"),
        ("onnx::MatMul_331", "/enc/layer.0/query/MatMul", {}, {}, "enc/layer.0/query"),
        ("onnx::MatMul_331", "/enc/MatMul_1", {}, {}, "enc/MatMul_1"),
        ("/fc/Constant_3_output_0", "/fc/MatMul", {}, {}, "fc"),
        ("model/Const_24:0", "model/Dense/MatMul", {}, {}, "model/Dense"),
        ("331", "", {}, {}, "331"),
    ],
)
def test_names(initializer, node_name, value_metadata, node_metadata, expected):
    value = ir.Value(name=initializer, metadata_props=value_metadata)
    user = ir.Node("", "MatMul", [], name=node_name, metadata_props=node_metadata)
    assert site_name(value, user) == expected


def test_names_are_unique_and_nodes_without_one_take_their_output_name(make):
    nodes = [helper.make_node("MatMul", ["x", name], [f"y{name}"]) for name in ("1", "2")]
    for unnamed in nodes:
        unnamed.name = ""
    proto = make(nodes, {"x": [5, 6]}, {"1": W, "2": W}, ["y1", "y2"])
    assert [site.nodes for site in found(proto).sites] == [("y1",), ("y2",)]
    for named in proto.graph.node:
        named.name = "/fc/MatMul"
    assert [site.name for site in found(proto).sites] == ["fc", "fc#2"]


# ---- deployment


@pytest.mark.parametrize(
    ("shape", "group", "eligible", "text"),
    [
        ((512, 384, 3, 3), 1, True, "384 input channels at each kernel position.*likely picked"),
        ((512, 256, 3, 3), 1, True, "seldom picked"),
        ((512, 30, 3, 3), 1, False, "30 input channels .* not a multiple of 4"),
        ((512, 384, 1, 1), 2, True, "grouped"),
        ((520, 384, 1, 1), 1, True, "likely .* multiples of 16"),
        ((384, 512), 1, True, "384 inputs .axis 0. .*likely picked"),
    ],
)
def test_eligibility(make, shape, group, eligible, text):
    weight = np.ones(shape, np.float32)
    user = node("MatMul", "x", "w", "y")
    if len(shape) > 2:
        user = node("Conv", "x", "w", "y", group=group)
    [site] = found(make([user], {"x": ["n", shape[0]]}, {"w": weight}, ["y"])).sites
    result, why = eligibility_2_4(site)
    assert result is eligible
    assert re.search(text, why)
