"""Small models, the real ones, and ONNX Runtime as the reference."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

Arrays = dict[str, np.ndarray]
SQUARE = np.arange(1, 1025, dtype=np.float32).reshape(32, 32)
SHARED = Path(__file__).resolve().parents[2] / "../shared"


@pytest.fixture
def make() -> Callable[..., onnx.ModelProto]:
    """Builds a model from nodes, graph inputs by name and shape, and initializers."""

    def build(
        nodes: list[onnx.NodeProto],
        inputs: dict[str, list[int | str]],
        initializers: Arrays,
        outputs: list[str],
        dtype: int = onnx.TensorProto.FLOAT,
        **fields: object,
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(n, dtype, shape) for n, shape in inputs.items()],
            [helper.make_tensor_value_info(n, dtype, None) for n in outputs],
            [numpy_helper.from_array(a, n) for n, a in initializers.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, ir_version=8, opset_imports=opsets, **fields)

    return build


@pytest.fixture
def run() -> Callable[[ir.Model | onnx.ModelProto, Arrays], Arrays]:
    """Runs a model in ONNX Runtime, without graph optimisation; outputs by name."""
    import onnxruntime as ort

    def execute(model: ir.Model | onnx.ModelProto, feeds: Arrays) -> Arrays:
        proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        session = ort.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    return execute


@pytest.fixture
def magika() -> Path:
    """A trained network with MatMul and Conv that the test environment always has."""
    spec = importlib.util.find_spec("magika")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    [path] = Path(spec.submodule_search_locations[0]).glob("models/standard_v3_3/model.onnx")
    return path


@pytest.fixture(params=["magika", "resnet20", "stories15M"])
def real_model(request: pytest.FixtureRequest) -> Path:
    if request.param == "magika":
        return request.getfixturevalue("magika")
    path = SHARED / "models" / f"{request.param}.onnx"
    if not path.is_file():
        pytest.skip(f"{request.param}.onnx is not beside the repository (shared/models)")
    return path.resolve()


@pytest.fixture
def canonical() -> Callable[[onnx.ModelProto], list[tuple[str, object]]]:
    """Lists all fields; a field left out and one written empty count as equal."""

    def walk(message, path):
        for field in message.DESCRIPTOR.fields:
            value = getattr(message, field.name)
            here = f"{path}.{field.name}"
            if field.message_type is None:
                yield here, list(value) if field.is_repeated else value
            elif field.is_repeated:
                yield here, len(value)
                for index, item in enumerate(value):
                    yield from walk(item, f"{here}[{index}]")
            elif message.HasField(field.name):
                yield from walk(value, here)

    return lambda proto: list(walk(proto, ""))


@pytest.fixture
def rich(make) -> onnx.ModelProto:
    """A model with everything that is easily lost: metadata, doc strings, two bodies of text."""
    nodes = [
        helper.make_node(
            "Constant", [], ["k"], "K", value=numpy_helper.from_array(SQUARE[:2], "in the node")
        ),
        helper.make_node("MatMul", ["x", "w"], ["y"], "Y", doc_string="multiplies"),
        helper.make_node("Transpose", ["k"], ["t"], "T"),
        helper.make_node("MatMul", ["y", "t"], ["z"], "Z"),
        helper.make_node("Add", ["z", "b"], ["out"], "A"),
    ]
    initializers = {
        "w": SQUARE,
        "b": np.ones(2, np.float32),
        "unused": SQUARE[0],
        "s": np.array(["a", "b"]),
    }
    proto = make(
        nodes, {"x": ["n", 32]}, initializers, ["out"], doc_string="model", producer_name="us"
    )
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("out", 1, ["n", 2]))
    # Stored as float_data rather than raw bytes, with metadata of its own.
    proto.graph.initializer[1].CopyFrom(helper.make_tensor("b", 1, [2], [0.5, 0.25]))
    proto.graph.initializer[0].doc_string = "weight"
    for owner in (proto, proto.graph, proto.graph.node[1], *proto.graph.initializer[:2]):
        for key in ("a", "b"):
            owner.metadata_props.add(key=key, value=f"{key}-value")
    proto.graph.value_info.append(helper.make_tensor_value_info("y", 1, ["n", 32]))
    proto.graph.value_info[0].doc_string = "a value"
    return proto


@pytest.fixture
def save_external() -> Callable[[onnx.ModelProto, Path, str], None]:
    """Writes a model with its tensors of 100 bytes and more in a file of their own."""

    def save(proto: onnx.ModelProto, path: Path, location: str) -> None:
        # onnx moves the tensors out of the model it is given.
        own = onnx.ModelProto()
        own.CopyFrom(proto)
        onnx.save(own, path, save_as_external_data=True, location=location, size_threshold=100)

    return save


@pytest.fixture
def external(rich, tmp_path, save_external) -> Path:
    path = tmp_path / "in" / "m.onnx"
    path.parent.mkdir()
    save_external(rich, path, "m.bin")
    return path
