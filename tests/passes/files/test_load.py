"""Loading and hashing: every way a file can be wrong has its one line."""

import hashlib
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from iobs_onnx.errors import ModelError
from iobs_onnx.passes import (
    load_model,
    model_hash,
)

W = np.arange(1, 1025, dtype=np.float32).reshape(32, 32)

# ---- what is refused on the way in


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .No such file"),
        (b"", "empty"),
        (b"certainly not a protobuf", "not an ONNX file"),
    ],
)
def test_files_that_are_no_model(tmp_path, content, message):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cut_off_file_and_folder(rich, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(rich.SerializeToString()[:-50])
    with pytest.raises(ModelError, match="not an ONNX file, or cut off"):
        load_model(path)
    with pytest.raises(ModelError, match="not a regular file"):
        load_model(tmp_path)


def test_unsorted_and_invalid_graphs_are_refused(rich):
    unsorted = onnx.ModelProto()
    unsorted.CopyFrom(rich)
    first = unsorted.graph.node.pop(0)
    unsorted.graph.node.append(first)
    for form in (unsorted, ir.from_proto(unsorted)):
        with pytest.raises(ModelError, match="'T' stands before 'K'"):
            load_model(form)
    rich.graph.node[4].input[1] = "nothing"
    with pytest.raises(ModelError, match="'nothing' is read, but nothing in its graph computes it"):
        load_model(rich)
    rich.graph.node[3].output[0] = "y"
    with pytest.raises(ModelError, match="not a valid ONNX model: Output 'y' is redeclared"):
        load_model(rich)


def edit_external(path: Path, **entries: object) -> None:
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = str(entries.get(entry.key, entry.value))
    onnx.save(proto, path)


def test_external_data_missing(external):
    (external.parent / "m.bin").unlink()
    with pytest.raises(ModelError, match=r"'m.bin' of tensor '.*' is missing"):
        load_model(external)


def test_external_data_too_short(external):
    data = external.parent / "m.bin"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ModelError, match="too short"):
        load_model(external)


@pytest.mark.parametrize(
    ("entries", "message"),
    [({"length": 8}, "too short"), ({"offset": 10**9}, "too short"), ({"offset": -4}, "-4")],
)
def test_external_data_out_of_bounds(external, entries, message):
    edit_external(external, **entries)
    with pytest.raises(ModelError, match=message):
        load_model(external)


@pytest.mark.parametrize("how", ["..", "absolute", "symlink"])
def test_external_data_outside_the_folder(external, tmp_path, how):
    outside = tmp_path / "secret.bin"
    (external.parent / "m.bin").rename(outside)
    if how == "symlink":
        (external.parent / "m.bin").symlink_to(outside)
    else:
        edit_external(external, location="../secret.bin" if how == ".." else outside)
    with pytest.raises(ModelError, match="leaves the model's folder"):
        load_model(external)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("m\0.bin", "is not a file name"),
        ("", "not a regular file"),
        ("folder", "not a regular file"),
        ("n" * 300, "cannot be read .File name too long"),
        ("circle", "cannot be read .Too many levels of symbolic links"),
        ("pipe", "not a regular file"),
    ],
)
def test_external_data_that_are_no_file(external, location, message):
    folder = external.parent
    (folder / "folder").mkdir()
    (folder / "circle").symlink_to("circle")
    os.mkfifo(folder / "pipe")
    edit_external(external, location=location)
    with pytest.raises(ModelError, match=message):
        load_model(external)


def test_a_link_within_the_folder_is_followed(external):
    (external.parent / "m.bin").rename(external.parent / "real.bin")
    (external.parent / "m.bin").symlink_to("real.bin")
    assert np.array_equal(load_model(external).graph.initializers["w"].const_value.numpy(), W)


def test_external_data_with_hard_links(external, tmp_path):
    os.link(external.parent / "m.bin", tmp_path / "other.bin")
    with pytest.raises(ModelError, match="several hard links"):
        load_model(external)


def test_a_proto_with_external_data_needs_its_path(external):
    with pytest.raises(ModelError, match="give the path"):
        load_model(onnx.load(external, load_external_data=False))


def test_a_relative_path_survives_a_change_of_folder(external, monkeypatch, tmp_path):
    monkeypatch.chdir(external.parent)
    model = load_model("m.onnx")
    monkeypatch.chdir(tmp_path)
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), W)


# ---- hash


def test_hash_of_a_plain_file_is_its_sha256(rich, tmp_path):
    onnx.save(rich, tmp_path / "m.onnx")
    expected = hashlib.sha256((tmp_path / "m.onnx").read_bytes()).hexdigest()
    assert model_hash(tmp_path / "m.onnx") == expected


def test_hash_covers_external_data(external):
    before = model_hash(external)
    data = external.parent / "m.bin"
    content = bytearray(data.read_bytes())
    expected = external.read_bytes() + b"m.bin" + bytes(content)
    assert before == hashlib.sha256(expected).hexdigest()
    content[0] ^= 1
    data.write_bytes(content)
    assert model_hash(external) != before
