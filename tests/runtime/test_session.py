import logging
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from iobs_onnx.errors import DependencyError, ModelError, OptionError
from iobs_onnx.runtime.session import (
    InputSpec,
    input_specs,
    on_cuda,
    open_session,
    run_errors,
    session_info,
)

FEED = {"x": np.arange(12, dtype=np.float32).reshape(2, 6) - 5}


def expected(model):
    weight = onnx.numpy_helper.to_array(model.graph.initializer[0])
    return np.maximum(FEED["x"], 0) @ weight


@pytest.fixture
def external(linear, tmp_path):
    path = tmp_path / "sub" / "model.onnx"
    path.parent.mkdir()
    onnx.save(linear, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_opens_a_path_a_proto_and_an_ir_model(linear, tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(linear, path)
    for model in (str(path), path, linear, ir.load(path)):
        session = open_session(model, "cpu")
        np.testing.assert_allclose(session.run(["y"], FEED)[0], expected(linear), rtol=1e-5)


def test_a_large_tensor_that_nothing_reads_is_no_obstacle(linear):
    """ONNX Runtime has dropped it before it looks for values that are passed beside the message."""
    weight = onnx.numpy_helper.to_array(linear.graph.initializer[0])
    unread = onnx.numpy_helper.from_array(np.zeros(1024, np.float32), "unread")
    linear.graph.initializer.append(unread)
    session = open_session(ir.from_proto(linear), "cpu")
    np.testing.assert_allclose(
        session.run(["y"], FEED)[0], np.maximum(FEED["x"], 0) @ weight, rtol=1e-5
    )


def test_finds_external_data_of_a_path_and_of_an_ir_model(external, monkeypatch):
    linear = onnx.load(external)
    for model in (external, ir.load(external)):
        session = open_session(model, "cpu")
        np.testing.assert_allclose(session.run(["y"], FEED)[0], expected(linear), rtol=1e-5)
    proto = onnx.load(external, load_external_data=False)
    monkeypatch.chdir(external.parent)
    session = open_session(proto, "cpu")
    np.testing.assert_allclose(session.run(["y"], FEED)[0], expected(linear), rtol=1e-5)


def test_external_data_stay_out_of_the_message(external, monkeypatch):
    module = sys.modules["iobs_onnx.runtime.session"]
    monkeypatch.setattr(module, "_PROTOBUF_LIMIT", 10)
    assert open_session(ir.load(external), "cpu").run(["y"], FEED)


def test_missing_external_data(external):
    (external.parent / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"sub/model\.onnx: .*weights\.bin"):
        open_session(external, "cpu")


def test_external_data_in_two_folders_and_behind_a_link(build, tmp_path):
    weight, bias = np.ones((6, 4), np.float32), np.arange(4, dtype=np.float32)
    proto = build(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"])],
        {"x": (TensorProto.FLOAT, [2, 6])},
        {"y": (TensorProto.FLOAT, [2, 4])},
        {"w": weight, "b": bias},
    )
    model = ir.from_proto(proto)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/w").write_bytes(weight.tobytes())
    (tmp_path / "model").mkdir()
    (tmp_path / "model/w.bin").symlink_to(tmp_path / "blobs/w")
    (tmp_path / "b.bin").write_bytes(b"odd" + bias.tobytes())
    for name, array, folder, offset in (
        ("w", weight, tmp_path / "model", 0),
        ("b", bias, tmp_path, 3),
    ):
        model.graph.initializers[name].const_value = ir.ExternalTensor(
            f"{name}.bin",
            offset,
            array.nbytes,
            ir.DataType.FLOAT,
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=folder,
        )
    session = open_session(model, "cpu")
    np.testing.assert_allclose(session.run(["y"], FEED)[0], FEED["x"] @ weight + bias, rtol=1e-5)
    # The model itself still names its own files.
    kept = model.graph.initializers["b"].const_value
    assert isinstance(kept, ir.ExternalTensor)
    assert kept.location == "b.bin"


def test_too_large_for_one_message(linear, monkeypatch):
    monkeypatch.setattr(sys.modules["iobs_onnx.runtime.session"], "_PROTOBUF_LIMIT", 10)
    with pytest.raises(ModelError, match=r"'small': more than 2 GB .* external data"):
        open_session(ir.from_proto(linear), "cpu")


def test_a_message_that_cannot_be_made(linear, monkeypatch):
    class Huge:
        graph = linear.graph

        def SerializeToString(self):
            raise ValueError("too large")

    monkeypatch.setattr(ir, "to_proto", lambda model: Huge())
    with pytest.raises(ModelError, match="'small': more than 2 GB"):
        open_session(ir.from_proto(linear), "cpu")


def test_missing_file(tmp_path):
    with pytest.raises(ModelError, match=r"none\.onnx: no such file"):
        open_session(tmp_path / "none.onnx")


def test_not_a_model(tmp_path, build):
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"\x08not a model")
    with pytest.raises(ModelError, match=r"bad\.onnx: ONNX Runtime cannot load it: ") as caught:
        open_session(path, "cpu")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    kind = (TensorProto.FLOAT, [2])
    model = build([helper.make_node("Relu", ["x"], ["y"])], {"x": kind}, {"y": kind})
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match=r"'small': ONNX Runtime cannot load it: .*NoSuchOperator"):
        open_session(model, "cpu")


def test_unknown_provider(linear):
    with pytest.raises(OptionError, match="provider 'tpu': expected auto, cpu or cuda"):
        open_session(linear, "tpu")


def test_cuda_by_name_must_be_there(linear):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine's onnxruntime has the CUDA provider")
    with pytest.raises(DependencyError, match=r"provider cuda: .*iobs-onnx\[gpu\]"):
        open_session(linear, "cuda")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_cuda_that_does_not_load(linear, monkeypatch, caplog):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine's onnxruntime has the CUDA provider")
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    with pytest.raises(DependencyError, match="could not load CUDA"):
        open_session(linear, "cuda")
    with caplog.at_level(logging.WARNING):
        session = open_session(linear, "auto")
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert not on_cuda(session)
    assert "runs on the CPU" in caplog.text


def test_no_onnxruntime(linear, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DependencyError, match=r"not installed: pip install 'iobs-onnx\[cpu\]'"):
        open_session(linear)


def test_session_info(linear):
    import onnxruntime

    info = session_info(open_session(linear, "cpu"))
    assert info == {
        "onnxruntime": onnxruntime.__version__,
        "providers": ["CPUExecutionProvider"],
    }


def test_input_specs(build):
    model = build(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"]),
            helper.make_node("Mul", ["rows", "scale"], ["y"]),
        ],
        {
            "ids": (TensorProto.INT64, ["n", 8]),
            "scale": (TensorProto.FLOAT16, []),
            "table": (TensorProto.FLOAT16, [3, 4]),
        },
        {"y": (TensorProto.FLOAT16, ["n", 8, 4])},
        {"table": np.ones((3, 4), np.float16)},
    )
    assert input_specs(ir.from_proto(model)) == (
        InputSpec("ids", np.dtype(np.int64), (None, 8)),
        InputSpec("scale", np.dtype(np.float16), ()),
        InputSpec("table", np.dtype(np.float16), (3, 4), optional=True),
    )


def test_input_that_numpy_cannot_hold(build):
    kind = (TensorProto.STRING, [2])
    model = build([helper.make_node("Identity", ["s"], ["y"])], {"s": kind}, {"y": kind})
    with pytest.raises(ModelError, match=r"input 's': its type STRING cannot"):
        input_specs(ir.from_proto(model))


def test_run_errors(linear):
    session = open_session(linear, "cpu")
    with (
        pytest.raises(ModelError, match="cannot run the model on this feed: ") as caught,
        run_errors(),
    ):
        session.run(None, {"x": np.zeros((2, 7), np.float32)})
    assert "\n" not in str(caught.value)
