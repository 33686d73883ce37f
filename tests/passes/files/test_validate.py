"""Models that lie about themselves are refused in one line before anything is allocated."""

import logging
import os

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from iobs_onnx.errors import ModelError
from iobs_onnx.passes import find_sites, load_model
from iobs_onnx.passes.files import validate

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
SPARSE = onnx.AttributeProto.SPARSE_TENSOR


def refused(proto, message):
    with pytest.raises(ModelError, match=message) as caught:
        load_model(proto)
    assert "\n" not in str(caught.value)


@pytest.fixture
def linear(make):
    """`y = x @ w`, with `w` (4, 4)."""
    return make(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "m")],
        {"x": ["n", 4]},
        {"w": np.eye(4, dtype=np.float32)},
        ["y"],
    )


# ---- tensors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dims": [4, 5]}, r"FLOAT of shape \[4, 5\], needs 80 of raw_data and holds 64"),
        ({"dims": [2**40, 2**40]}, "holds 64"),
        ({"dims": [-4, -4]}, r"negative shape \[-4, -4\]"),
        ({"data_type": 0}, "has no type"),
        ({"data_type": 99}, "unknown type 99"),
        ({"data_type": onnx.TensorProto.DOUBLE}, "needs 128 of raw_data"),
        ({"data_type": onnx.TensorProto.STRING}, "strings cannot be raw data"),
        ({"raw_data": b""}, "needs 64 of raw_data and holds 0"),
        ({"float_data": [1.0]}, "holds both float_data and raw_data"),
    ],
)
def test_stored_data_must_fit_shape_and_type(linear, fields, message):
    tensor = linear.graph.initializer[0]
    changed = onnx.TensorProto(
        **{"name": "w", "dims": [4, 4], "data_type": FLOAT, "raw_data": tensor.raw_data} | fields
    )
    tensor.CopyFrom(changed)
    refused(linear, message)


@pytest.mark.parametrize(
    ("dtype", "values", "fits"),
    [
        (FLOAT, {"float_data": [1.0] * 16}, True),
        (FLOAT, {"float_data": [1.0] * 15}, False),
        (FLOAT, {}, False),
        (FLOAT, {"int32_data": [1] * 16}, False),
        (onnx.TensorProto.DOUBLE, {"double_data": [1.0] * 16}, True),
        (onnx.TensorProto.COMPLEX64, {"float_data": [1.0] * 32}, True),
        (onnx.TensorProto.FLOAT16, {"int32_data": [1] * 16}, True),
        (onnx.TensorProto.BFLOAT16, {"raw_data": bytes(32)}, True),
        (onnx.TensorProto.INT4, {"int32_data": [1] * 8}, True),
        (onnx.TensorProto.INT4, {"raw_data": bytes(8)}, True),
        (onnx.TensorProto.INT4, {"raw_data": bytes(16)}, False),
        (onnx.TensorProto.UINT32, {"uint64_data": [1] * 16}, True),
        (onnx.TensorProto.STRING, {"string_data": [b"a"] * 16}, True),
        (onnx.TensorProto.STRING, {"string_data": [b"a"]}, False),
    ],
)
def test_each_type_has_its_field(linear, dtype, values, fits):
    tensor = onnx.TensorProto(name="other", dims=[4, 4], data_type=dtype, **values)
    linear.graph.initializer.append(tensor)
    if not fits:
        refused(linear, "'other'")
        return
    held = load_model(linear).graph.initializers["other"].const_value
    assert held.shape.numpy() == (4, 4)


def test_tensors_of_nodes_and_bodies_are_looked_at_too(make):
    lie = onnx.TensorProto(name="lie", dims=[2**50], data_type=FLOAT, raw_data=b"")
    constant = helper.make_node("Constant", [], ["k"], value=lie)
    refused(make([constant], {}, {}, ["k"]), "tensor 'lie'")
    body = helper.make_graph(
        [helper.make_node("Identity", ["lie"], ["o"])],
        "body",
        [],
        [helper.make_tensor_value_info("o", FLOAT, None)],
        [lie],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    refused(make([node], {}, {"c": np.array(True)}, ["y"]), "tensor 'lie'")


def sparse(name="s", indices=(0, 5), dims=(4, 4), values=(1.0, 2.0)):
    return helper.make_sparse_tensor(
        helper.make_tensor(name, FLOAT, [len(values)], values),
        helper.make_tensor(f"{name}_i", INT64, [len(indices)], indices),
        dims,
    )


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (sparse(indices=(0, 16)), "index value at position"),
        (sparse(indices=(5, 0)), "not in sorted order"),
        (sparse(dims=(2**20, 2**20)), "bytes once dense, which is not supported"),
        (sparse("w"), "initializer 'w' is declared twice"),
        (sparse(""), "an initializer has no name"),
    ],
)
def test_sparse_tensors_that_lie(linear, tensor, message):
    linear.graph.sparse_initializer.append(tensor)
    refused(linear, message)


def test_sparse_tensors_that_cannot_be_kept(linear, make):
    custom = helper.make_node("Thing", ["x"], ["y"], "T", domain="mine", weight=sparse())
    proto = make([custom], {"x": [4]}, {}, ["y"])
    refused(proto, "node 'T' holds a sparse tensor, which would be lost")
    constant = helper.make_node("Constant", [], ["y"], sparse_value=sparse())
    linear.functions.append(
        helper.make_function("local", "F", [], ["y"], [constant], [helper.make_opsetid("", 17)])
    )
    refused(linear, "function 'F' holds a sparse tensor")
    linear.ClearField("functions")
    linear.graph.sparse_initializer.append(sparse())
    values = linear.graph.sparse_initializer[0].values
    values.data_location = onnx.TensorProto.EXTERNAL
    refused(linear, "external data, which is not supported")


# ---- names, attributes, versions


def test_names_that_must_be_unique(linear):
    for field, message in (("initializer", "initializer 'w'"), ("input", "input 'x'")):
        proto = onnx.ModelProto()
        proto.CopyFrom(linear)
        members = getattr(proto.graph, field)
        members.append(members[0])
        refused(proto, f"{message} is declared twice")
    linear.graph.node[0].attribute.extend([helper.make_attribute("a", 1)] * 2)
    refused(linear, "attribute of node 'm' 'a' is declared twice")
    del linear.graph.node[0].attribute[:]
    linear.opset_import.append(linear.opset_import[0])
    refused(linear, "opset domain '' is declared twice")


@pytest.mark.parametrize(
    ("op_type", "attributes", "message"),
    [
        ("Gemm", {"transB": 1.0}, "'transB' of Gemm 'n' is not INT"),
        ("Transpose", {"perm": [0, 5]}, "'perm' of Transpose 'n' has a value out of range"),
        ("Conv", {"group": 0}, "'group' of Conv 'n' has a value out of range"),
        ("Cast", {"to": 77}, "'to' of Cast 'n' has a value out of range"),
    ],
)
def test_attributes_of_standard_operators(make, op_type, attributes, message):
    node = helper.make_node(op_type, ["x", "w"], ["y"], "n", **attributes)
    refused(make([node], {"x": [4, 4]}, {"w": np.eye(4, dtype=np.float32)}, ["y"]), message)


def test_what_has_no_meaning(linear):
    linear.graph.initializer[0].segment.begin = 0
    refused(linear, "is a segment of another")
    linear.graph.node[0].attribute.add(name="a")
    linear.graph.initializer[0].ClearField("segment")
    refused(linear, "'a' of MatMul 'm' has no type")


def test_a_reference_to_an_attribute_outside_a_function(linear):
    node = helper.make_node("Transpose", ["y"], ["z"], "t")
    node.attribute.add(name="perm", ref_attr_name="p", type=onnx.AttributeProto.INTS)
    linear.graph.node.append(node)
    refused(linear, "refers to a function outside one")


def test_versions(linear):
    linear.ir_version = onnx.IR_VERSION + 1
    refused(linear, "is newer than the installed onnx knows")
    linear.ir_version = 8
    linear.opset_import[0].version = 2**40
    refused(linear, "opset '' has no version 1099511627776")


def test_names_that_are_not_utf8(linear, tmp_path):
    linear.metadata_props.add(key="k", value="metadata")
    linear.graph.node[0].doc_string = "documented"
    for text in (b"MatMul", b"metadata", b"documented", b"com.microsoft"):
        content = linear.SerializeToString().replace(text, b"\xff" + text[1:])
        (tmp_path / "m.onnx").write_bytes(content)
        refused(tmp_path / "m.onnx", "is not UTF-8")


# ---- functions and graphs


def calls(name, *callees):
    nodes = [
        helper.make_node(callee, ["a" if i == 0 else f"h{i}"], [f"h{i + 1}"], domain="local")
        for i, callee in enumerate(callees)
    ]
    nodes.append(helper.make_node("Relu", [f"h{len(callees)}" if callees else "a"], ["b"]))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a"], ["b"], nodes, imports)


def test_functions_that_call_themselves(linear):
    linear.functions.extend([calls("F", "G"), calls("G", "F")])
    refused(linear, "model-local function '[FG]' calls itself")


def test_functions_that_unfold_without_bound(linear):
    linear.opset_import.append(helper.make_opsetid("local", 1))
    linear.functions.extend(calls(f"F{i}", f"F{i + 1}", f"F{i + 1}") for i in range(40))
    linear.functions.append(calls("F40"))
    load_model(linear)
    linear.graph.node.append(helper.make_node("F0", ["y"], ["z"], domain="local"))
    refused(linear, "until they make [0-9]{12,} nodes")
    linear.functions.append(linear.functions[0])
    refused(linear, "function 'local::F0' is declared twice")


def test_cycles(make):
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"], "A"),
        helper.make_node("Relu", ["a"], ["b"], "B"),
    ]
    refused(make(nodes, {"x": [1]}, {}, ["b"]), "'A' stands before 'B'")
    alone = helper.make_node("Add", ["x", "y"], ["y"], "A")
    refused(make([alone], {"x": [1]}, {}, ["y"]), "'A' stands before 'A'")


def test_refusals_are_not_logged_as_well(linear, caplog):
    linear.graph.node[0].input[1] = "nothing"
    with caplog.at_level(logging.DEBUG):
        refused(linear, "'nothing' is read")
    assert caplog.records == []
    assert logging.getLogger("onnx_ir.serde").level == logging.NOTSET


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "m.onnx")
    refused(tmp_path / "m.onnx", "not a regular file")


def test_files_that_protobuf_cannot_read(tmp_path):
    with open(tmp_path / "m.onnx", "wb") as file:
        file.truncate(2**31)
    refused(tmp_path / "m.onnx", "more than protobuf reads")


# ---- unusual, but valid


def test_graphs_without_nodes_or_weights(make):
    empty = make([], {"x": [2, 2]}, {}, ["x"])
    weightless = make([helper.make_node("MatMul", ["x", "x"], ["y"])], {"x": [2, 2]}, {}, ["y"])
    for proto in (empty, weightless):
        proto.graph.output[0].type.CopyFrom(proto.graph.input[0].type)
        onnx.checker.check_model(proto)
        found = find_sites(load_model(proto))
        assert (found.sites, found.declined) == ((), ())


def test_unknown_operators_and_opsets_are_left_alone(linear):
    node = helper.make_node("Gemm", ["y"], ["z"], domain="mine", transB=0.5)
    linear.graph.node.append(node)
    linear.opset_import.append(helper.make_opsetid("mine", 3))
    assert [site.initializer for site in find_sites(load_model(linear)).sites] == ["w"]
    linear.opset_import[0].version = 1000
    assert len(find_sites(load_model(linear)).sites) == 1


@pytest.mark.parametrize("ir_version", range(3, onnx.IR_VERSION + 1))
def test_weights_that_are_graph_inputs(linear, ir_version):
    linear.ir_version = ir_version
    linear.graph.input.append(helper.make_tensor_value_info("w", FLOAT, [4, 4]))
    [site] = find_sites(load_model(linear)).sites
    assert site.initializer == "w"


def test_validation_decodes_no_tensor(linear, monkeypatch):
    monkeypatch.setattr(numpy_helper, "to_array", None)
    validate.require_sound(linear, "m")
