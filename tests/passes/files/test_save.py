"""Saving: what is kept to the bit, what stays outside, what is refused."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from iobs_onnx.errors import OptionError
from iobs_onnx.passes import (
    check_model,
    find_sites,
    load_model,
    rewrite,
    save_model,
)
from iobs_onnx.passes.files import load_save

W = np.arange(1, 1025, dtype=np.float32).reshape(32, 32)


def folder_of(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


# ---- round trips


def test_real_model_comes_back_field_by_field(real_model, tmp_path, canonical):
    save_model(load_model(real_model), tmp_path / "out.onnx")
    assert canonical(onnx.load(tmp_path / "out.onnx")) == canonical(onnx.load(real_model))
    assert folder_of(tmp_path) == ["out.onnx"]


@pytest.mark.parametrize("form", ["path", "proto", "ir"])
def test_rich_model_comes_back_field_by_field(rich, tmp_path, form, canonical):
    onnx.save(rich, tmp_path / "in.onnx")
    source = {"path": tmp_path / "in.onnx", "proto": rich, "ir": load_model(rich)}[form]
    save_model(load_model(source), tmp_path / "out.onnx")
    assert canonical(onnx.load(tmp_path / "out.onnx")) == canonical(rich)


def test_value_info_of_an_initializer_is_kept_where_the_original_had_one(rich, tmp_path, canonical):
    rich.graph.value_info.insert(0, helper.make_tensor_value_info("w", 1, [32, 32]))
    save_model(load_model(rich), tmp_path / "out.onnx")
    assert canonical(onnx.load(tmp_path / "out.onnx")) == canonical(rich)


def test_order_of_value_info_and_of_metadata_is_kept(rich, tmp_path):
    """Also of what names an output, or nothing at all, as exporters leave it."""
    first = [info.name for info in rich.graph.value_info]
    for name in ("gone", rich.graph.output[0].name, "w"):
        rich.graph.value_info.insert(0, helper.make_tensor_value_info(name, 1, [1]))
    del rich.metadata_props[:]
    helper.set_model_props(rich, {"z": "1", "a": "2", "m": "3"})
    model = load_model(rich)
    save_model(model, tmp_path / "copy.onnx")
    copy = onnx.load(tmp_path / "copy.onnx")
    assert [info.name for info in copy.graph.value_info][3:] == first
    assert len(copy.graph.value_info) == 3 + len(first)
    assert list(copy.graph.value_info)[2:] == list(rich.graph.value_info)[2:]
    assert list(copy.metadata_props) == list(rich.metadata_props)
    # What is made later comes after.
    model.metadata_props["b"] = "4"
    save_model(model, tmp_path / "copy.onnx")
    copy = onnx.load(tmp_path / "copy.onnx")
    assert [entry.key for entry in copy.metadata_props] == ["z", "a", "m", "b"]


def test_an_output_of_a_body_without_a_type(make, tmp_path):
    def body(name: str) -> onnx.GraphProto:
        out = onnx.ValueInfoProto(name="o")
        out.type.SetInParent()
        return helper.make_graph([helper.make_node("Relu", ["x"], ["o"])], name, [], [out])

    node = helper.make_node("If", ["c"], ["y"], then_branch=body("t"), else_branch=body("e"))
    proto = make([node], {"x": [2]}, {"c": np.array(True)}, ["y"])
    save_model(load_model(proto), tmp_path / "copy.onnx")
    assert onnx.load(tmp_path / "copy.onnx").graph.node[0] == proto.graph.node[0]


def test_one_weight_rewritten_all_else_identical(real_model, tmp_path, canonical):
    model = load_model(real_model)
    site = find_sites(model).sites[1]
    before = onnx.load(real_model)
    old = {t.name: numpy_helper.to_array(t) for t in before.graph.initializer}[site.initializer]
    rewrite(model, {site.initializer: old * np.float32(0.5)})
    save_model(model, tmp_path / "out.onnx")
    after = onnx.load(tmp_path / "out.onnx")
    [changed] = [t for t in after.graph.initializer if t.name == site.initializer]
    assert np.array_equal(numpy_helper.to_array(changed), old * np.float32(0.5))
    changed.CopyFrom(next(t for t in before.graph.initializer if t.name == site.initializer))
    assert canonical(after) == canonical(before)


def test_two_saves_are_byte_identical(rich, external, tmp_path):
    for source in (rich, external):
        for name in ("a.onnx", "b.onnx"):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            save_model(load_model(source), folder / "m.onnx")
        names = folder_of(tmp_path / "a.onnx")
        assert names == folder_of(tmp_path / "b.onnx")
        for name in names:
            first, second = (tmp_path / side / name for side in ("a.onnx", "b.onnx"))
            assert first.read_bytes() == second.read_bytes()


# ---- external data


def test_external_data_stay_external_and_leave_no_stale_bytes(
    external, rich, tmp_path, run, canonical
):
    model = load_model(external)
    assert isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)
    # Both tensors outside the file are exchanged: the origin alone says that it is external.
    rewrite(model, {"w": -W, "unused": -W[0]})
    out = tmp_path / "out" / "sparse.onnx"
    out.parent.mkdir()
    save_model(model, out)
    assert folder_of(out.parent) == ["sparse.onnx", "sparse.onnx.data"]
    data = (out.parent / "sparse.onnx.data").read_bytes()
    assert data == (-W).tobytes()
    inside = {
        t.name: t.data_location == onnx.TensorProto.EXTERNAL
        for t in onnx.load(out, load_external_data=False).graph.initializer
    }
    # 128 bytes are not worth a place outside.
    assert inside == {"w": True, "b": False, "unused": False, "s": False}
    check_model(out)
    after, before = onnx.load(out), onnx.load(external)
    for proto in (after, before):
        for tensor in proto.graph.initializer[:3]:
            tensor.ClearField("raw_data")
            tensor.ClearField("data_location")
            del tensor.external_data[:]
    assert canonical(after) == canonical(before)
    x = np.eye(32, dtype=np.float32)
    assert np.array_equal(
        run(onnx.load(out), {"x": x})["out"], -(W @ W[:2].T) + np.float32([0.5, 0.25])
    )


def test_external_constant_of_a_node_comes_into_the_model(rich, external, tmp_path):
    proto = onnx.load(external, load_external_data=False)
    tensor = proto.graph.node[0].attribute[0].t
    (external.parent / "k.bin").write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, "k.bin", 0, len(tensor.raw_data))
    tensor.ClearField("raw_data")
    onnx.save(proto, external)
    save_model(load_model(external), tmp_path / "out.onnx")
    written = onnx.load(tmp_path / "out.onnx", load_external_data=False).graph.node[0]
    assert np.array_equal(numpy_helper.to_array(written.attribute[0].t), W[:2])


def test_large_models_become_external(rich, tmp_path, monkeypatch):
    monkeypatch.setattr(load_save, "MAX_INLINE_BYTES", 4000)
    save_model(load_model(rich), tmp_path / "out.onnx")
    assert folder_of(tmp_path) == ["out.onnx", "out.onnx.data"]
    loaded = load_model(tmp_path / "out.onnx")
    assert np.array_equal(loaded.graph.initializers["w"].const_value.numpy(), W)
    tensor = loaded.graph.initializers["w"].const_value
    assert tensor.doc_string == "weight"
    assert dict(tensor.metadata_props) == {"a": "a-value", "b": "b-value"}


# ---- what onnx_ir cannot hold


def sparse_tensor(name: str, dims: list[int], two_dimensional: bool) -> onnx.SparseTensorProto:
    flat = [1, 6, 11]
    indices = np.stack(np.unravel_index(flat, dims), axis=1) if two_dimensional else np.array(flat)
    return helper.make_sparse_tensor(
        helper.make_tensor(name, 1, [3], [1.0, 2.0, 3.0]),
        numpy_helper.from_array(indices.astype(np.int64), f"{name}_indices"),
        dims,
    )


@pytest.fixture
def with_sparse(make) -> onnx.ModelProto:
    """An initializer and a Constant, both stored sparsely, and a dense one between them."""
    nodes = [
        helper.make_node("Constant", [], ["k"], "K", sparse_value=sparse_tensor("k", [4, 4], True)),
        helper.make_node("MatMul", ["x", "s"], ["y"], "Y"),
        helper.make_node("MatMul", ["y", "k"], ["z"], "Z"),
        helper.make_node("Add", ["z", "b"], ["out"], "A"),
    ]
    proto = make(nodes, {"x": ["n", 4]}, {"b": np.ones(4, np.float32)}, ["out"])
    proto.graph.sparse_initializer.append(sparse_tensor("s", [4, 4], False))
    return proto


def test_sparse_tensors_are_dense_in_memory_and_sparse_in_the_file(
    with_sparse, tmp_path, canonical, run
):
    model = load_model(with_sparse)
    dense = np.zeros(16, np.float32)
    dense[[1, 6, 11]] = [1, 2, 3]
    dense = dense.reshape(4, 4)
    for site in find_sites(model).sites:
        assert site.initializer in ("s", "k")
        assert site.shape == (4, 4)
    assert np.array_equal(model.graph.initializers["s"].const_value.numpy(), dense)
    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    # What the runtime is given is the graph in memory.
    assert np.array_equal(run(model, {"x": x})["out"], x @ dense @ dense + 1)
    save_model(load_model(model).clone(), tmp_path / "out.onnx")
    assert canonical(onnx.load(tmp_path / "out.onnx")) == canonical(with_sparse)


def test_a_sparse_tensor_that_is_exchanged_becomes_dense(with_sparse, tmp_path, run, monkeypatch):
    model = load_model(with_sparse)
    new = np.eye(4, dtype=np.float32)
    rewrite(model, {"s": new, "k": 2 * new})
    monkeypatch.setattr(load_save, "MAX_INLINE_BYTES", 0)
    save_model(model, tmp_path / "out.onnx")
    after = onnx.load(tmp_path / "out.onnx")
    assert not after.graph.sparse_initializer
    assert [tensor.name for tensor in after.graph.initializer] == ["b", "s"]
    assert [attribute.name for attribute in after.graph.node[0].attribute] == ["value"]
    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert np.array_equal(run(after, {"x": x})["out"], 2 * x + 1)


def test_sparse_initializer_of_a_body_comes_back(make, tmp_path, canonical):
    def body(name: str) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node("Identity", ["s"], ["o"])],
            name,
            [],
            [helper.make_tensor_value_info("o", 1, None)],
            sparse_initializer=[sparse_tensor("s", [4, 4], False)],
        )

    node = helper.make_node("If", ["c"], ["y"], then_branch=body("t"), else_branch=body("e"))
    proto = make([node], {}, {"c": np.array(True)}, ["y"])
    save_model(load_model(proto), tmp_path / "out.onnx")
    assert canonical(onnx.load(tmp_path / "out.onnx")) == canonical(proto)


def test_training_information_comes_back(rich, tmp_path, canonical):
    training = rich.training_info.add()
    training.algorithm.CopyFrom(rich.graph)
    training.update_binding.add(key="w", value="y")
    save_model(load_model(load_model(rich)), tmp_path / "out.onnx")
    assert canonical(onnx.load(tmp_path / "out.onnx")) == canonical(rich)


def test_types_of_maps_come_back(make, tmp_path, canonical):
    """As classifiers have them: a sequence of maps, an output and an inner value."""
    proto = make(
        [
            helper.make_node("MatMul", ["x", "w"], ["p"]),
            helper.make_node("ZipMap", ["p"], ["m"], domain="ai.onnx.ml", classlabels_int64s=[0]),
            helper.make_node("Identity", ["m"], ["out"]),
        ],
        {"x": ["n", 32]},
        {"w": W},
        ["out"],
    )
    kind = proto.graph.output[0].type
    kind.Clear()
    kind.sequence_type.elem_type.map_type.key_type = onnx.TensorProto.INT64
    kind.sequence_type.elem_type.map_type.value_type.tensor_type.elem_type = 1
    proto.graph.value_info.add(name="m", type=kind)
    model = load_model(proto)
    assert len(find_sites(model).sites) == 1
    save_model(model, tmp_path / "out.onnx")
    assert canonical(onnx.load(tmp_path / "out.onnx")) == canonical(proto)


@pytest.mark.parametrize("ir_version", [3, 4, 8, onnx.IR_VERSION])
@pytest.mark.parametrize("opset", [7, 13, onnx.defs.onnx_opset_version()])
@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16", "FLOAT", "DOUBLE"])
def test_versions_and_types(make, tmp_path, canonical, ir_version, opset, dtype):
    kind = ir.DataType[dtype]
    weight = np.arange(16).reshape(4, 4).astype(kind.numpy())
    proto = make([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": [4, 4]}, {}, ["y"], kind)
    proto.graph.initializer.append(ir.to_proto(ir.Tensor(weight, dtype=kind, name="w")))
    if ir_version < 4:
        proto.graph.input.append(helper.make_tensor_value_info("w", kind, [4, 4]))
    proto.ir_version, proto.opset_import[0].version = ir_version, opset
    model = load_model(proto)
    save_model(model, tmp_path / "out.onnx")
    assert canonical(onnx.load(tmp_path / "out.onnx")) == canonical(proto)
    [site] = find_sites(model).sites
    assert site.dtype == dtype
    rewrite(model, {"w": -weight})
    save_model(model, tmp_path / "out.onnx")
    [tensor] = onnx.load(tmp_path / "out.onnx").graph.initializer
    assert tensor.data_type == kind
    assert tensor.raw_data == (-weight).tobytes()


# ---- never aliasing


def test_a_loaded_ir_model_is_a_clone_that_shares_tensors(rich, canonical):
    mine = ir.from_proto(rich)
    loaded = load_model(mine)
    old = mine.graph.initializers["w"].const_value
    assert loaded.graph.initializers["w"].const_value is old
    rewrite(loaded, {"w": -W, "k": -W[:2]})
    assert mine.graph.initializers["w"].const_value is old
    assert canonical(ir.to_proto(mine)) == canonical(ir.to_proto(ir.from_proto(rich)))


def test_a_proto_is_not_changed(rich):
    before = rich.SerializeToString(deterministic=True)
    loaded = load_model(rich)
    rewrite(loaded, {"w": -W, "k": -W[:2]})
    assert rich.SerializeToString(deterministic=True) == before


# ---- what is refused on the way out


def test_output_over_input_is_refused(external, rich, tmp_path):
    inline = tmp_path / "inline.onnx"
    onnx.save(rich, inline)
    link = tmp_path / "link.onnx"
    link.symlink_to(inline)
    cases = [(inline, inline), (inline, link), (external, external)]
    cases.append((external, external.parent / "m.bin"))
    for source, output in cases:
        before = output.read_bytes()
        # The origin goes with clones, and with models that are loaded again.
        for model in (load_model(source), load_model(load_model(source)).clone()):
            with pytest.raises(OptionError, match="would overwrite the model"):
                save_model(model, output)
        assert output.read_bytes() == before


def test_data_file_over_input_is_refused(rich, tmp_path, save_external):
    save_external(rich, tmp_path / "in.onnx", "out.onnx.data")
    model = load_model(tmp_path / "in.onnx")
    before = (tmp_path / "out.onnx.data").read_bytes()
    with pytest.raises(OptionError, match=r"out.onnx.data: would overwrite"):
        save_model(model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").read_bytes() == before


def test_missing_folder(rich, tmp_path):
    with pytest.raises(OptionError, match="cannot be written"):
        save_model(load_model(rich), tmp_path / "no" / "out.onnx")


@pytest.mark.parametrize("fails", ["to_proto", "replace"])
def test_failure_leaves_the_old_output_and_nothing_else(external, tmp_path, monkeypatch, fails):
    out = tmp_path / "out"
    out.mkdir()
    (out / "m.onnx").write_bytes(b"old")
    model = load_model(external)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    target = load_save.protos if fails == "to_proto" else os
    monkeypatch.setattr(target, fails, fail)
    with pytest.raises(OptionError, match=r"cannot be written .No space left"):
        save_model(model, out / "m.onnx")
    monkeypatch.undo()
    assert folder_of(out) == ["m.onnx"]
    assert (out / "m.onnx").read_bytes() == b"old"
