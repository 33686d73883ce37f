"""What models compute in segments against what they compute as a whole, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import exports
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

import iobs_onnx
from iobs_onnx.engine import Engine
from iobs_onnx.errors import CheckError, DataError
from iobs_onnx.passes import find_sites, find_surroundings, load_model, partition, prepare

Feed = dict[str, NDArray[np.generic]]


def halved(path: Path, folder: Path) -> Path:
    """Convert a model to float16, its inputs and outputs too."""
    proto = convert_float_to_float16(onnx.load(path))
    model = ir.from_proto(proto)
    model.graph.sort()
    ir.save(model, folder / f"{path.stem}.fp16.onnx")
    return folder / f"{path.stem}.fp16.onnx"


def given(path: Path, feed: Feed) -> Feed:
    """Return a feed in the types that a model takes."""
    inputs = onnx.load(path, load_external_data=False).graph.input
    types = {i.name: helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type) for i in inputs}
    return {name: array.astype(types[name]) for name, array in feed.items()}


def whole(path: Path, feed: Feed, names: list[str]) -> Feed:
    """Run a file at once, with these values as further outputs."""
    model = onnx.load(path)
    have = {output.name for output in model.graph.output}
    model.graph.output.extend(
        helper.make_empty_tensor_value_info(name) for name in names if name not in have
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def in_segments(path: Path, feed: Feed, sequential: str, folder: Path) -> Feed:
    """Run a model as a walk does, and return all taps, borders and outputs."""
    dense = load_model(path)
    sites = find_sites(dense).sites
    model = prepare(dense, sites)
    around = find_surroundings(dense, sites)
    outputs = [value.name for value in dense.graph.outputs]
    streams = {site: found.residual for site, found in around.items() if found.residual is not None}
    segments = partition(model, sites, beside=streams, outputs=outputs, sequential=sequential)
    assert len(segments) > 1
    engine, found = Engine("cpu", 1 << 32, folder), Feed()
    stream = engine.stream(model, [feed])
    for segment in segments:
        taps = [*segment.taps, *segment.beside.values()]
        read = [name for tap in taps for name in tap.values]
        made = list(dict.fromkeys([*read, *segment.wanted, *segment.outputs]))
        session = engine.open(model, segment, made, stream)
        for batch in stream.run(session, fetch=made, keep=segment.outputs, alive=segment.alive):
            found |= {name: value.numpy().copy() for name, value in batch.values.items()}
    return found


def leading(path: Path) -> dict[str, int]:
    """Count the nodes that lead to each value of the main graph."""
    counts, before = {}, {}
    for i, node in enumerate(ir.load(path).graph):
        reached = 1 << i
        for value in node.inputs:
            reached |= before.get(value, 0)
        for value in node.outputs:
            before[value], counts[value.name] = reached, reached.bit_count()
    return counts


def assert_near(found: Feed, expected: Feed, nodes: dict[str, int], unit: float | None) -> None:
    """Hold values to a tolerance in the precision of those that are expected, or in `unit`.

    k operations that round to one part in 1 / u each, independently, leave an error of √k u in
    norm; 4 √k u allows for operations that round in several places or add errors up. Sigmoid,
    softmax and tanh are exact to an ulp of 1, whatever they give.
    """
    assert found
    for name, value in found.items():
        reference = expected[name]
        assert value.shape == reference.shape, name
        if reference.dtype.kind != "f":
            np.testing.assert_array_equal(value, reference, err_msg=name)
            continue
        with np.errstate(over="ignore"):
            finite = np.isfinite(value.astype(reference.dtype))
        np.testing.assert_array_equal(finite, np.isfinite(reference), err_msg=name)
        a, b = (x[finite].astype(np.float64) for x in (value, reference))
        u = unit or np.finfo(reference.dtype).eps / 2
        bound = 4 * nodes[name] ** 0.5 * u * np.linalg.norm(b) + 2.0**-23 * a.size**0.5
        assert np.linalg.norm(a - b) <= bound, (name, np.linalg.norm(a - b), bound)


def hold_together(path: Path, feed: Feed, folder: Path, unit: float | None = None) -> None:
    """Hold every tap, border and output of the segments to what the whole file computes."""
    feed, nodes = given(path, feed), leading(path)
    unchanged = whole(path, feed, [])
    for sequential in ("segment", "site"):
        found = in_segments(path, feed, sequential, folder)
        found = {name: value for name, value in found.items() if name in nodes}
        assert_near(found, whole(path, feed, list(found)), nodes, unit)
        outputs = {name: found[name] for name in unchanged if name in found}
        assert_near(outputs, unchanged, nodes, unit)


def pixels(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def tokens(vocabulary: int, length: int = 24) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, vocabulary, size=(2, length))


@pytest.fixture(params=["as it is", "float16"])
def in_precision(request: pytest.FixtureRequest, tmp_path: Path):
    """Return a function that gives a model back as it is or converted."""
    return lambda path: path if request.param == "as it is" else halved(path, tmp_path)


def test_classifiers(in_precision, magika_model: Path, paddle_model: Path, tmp_path: Path) -> None:
    bytes_ = np.random.default_rng(0).integers(0, 256, size=(4, 2048))
    hold_together(in_precision(magika_model), {"bytes": bytes_}, tmp_path)
    hold_together(in_precision(paddle_model), {"x": pixels(2, 3, 48, 96)}, tmp_path)


@pytest.mark.parametrize("name", exports.LANGUAGE)
def test_language_models(name: str, tmp_path: Path) -> None:
    path = exports.LANGUAGE[name]
    # Where kernels are packed, MatMulNBits rounds activations to eight bits (accuracy_level 4).
    unit = 2.0**-8 if name == "genai int4" else None
    hold_together(path, exports.language_feed(onnx.load(path)), tmp_path, unit)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's exporter
def test_text_to_speech(in_precision, tmp_path: Path) -> None:
    path = in_precision(exports.speech(tmp_path / "speech.onnx"))
    hold_together(path, {"input_ids": tokens(30)[:1]}, tmp_path)


@pytest.mark.slow
def test_minilm(in_precision, minilm_model: Path, minilm_feeds, tmp_path: Path) -> None:
    hold_together(in_precision(minilm_model), minilm_feeds[0], tmp_path)


@pytest.mark.slow
def test_text_in_pictures(in_precision, paddle_model: Path, tmp_path: Path) -> None:
    for name, shape in (("det", (1, 3, 160, 160)), ("rec", (2, 3, 48, 160))):
        path = in_precision(paddle_model.parent / f"ch_PP-OCRv4_{name}_infer.onnx")
        hold_together(path, {"x": pixels(*shape)}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "feed"),
    [
        ("resnet20", {"x": pixels(4, 3, 32, 32)}),
        ("resnet56", {"x": pixels(4, 3, 32, 32)}),
        ("stories15M", {"input_ids": tokens(31000)}),
    ],
)
def test_models_beside_the_checkout(
    in_precision, shared: Path, name: str, feed: Feed, tmp_path: Path
) -> None:
    hold_together(in_precision(shared / "models" / f"{name}.onnx"), feed, tmp_path)


def made(folder: Path, dtype: type, nodes: str, **arrays: NDArray[np.generic]) -> Path:
    """Save a model from x to y; a node is an operator, its inputs and its output."""
    lines = [line.split() for line in nodes.split(",")]
    made = [helper.make_node(op, read, [out], name=out) for op, *read, out in lines]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    infos = [helper.make_tensor_value_info(name, kind, ["n", 16]) for name in "xy"]
    stored = [
        numpy_helper.from_array(array.astype(dtype) if array.dtype.kind == "f" else array, key)
        for key, array in arrays.items()
    ]
    graph = helper.make_graph(made, "made", infos[:1], infos[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "made.onnx")
    return folder / "made.onnx"


def rows(dtype: type = np.float16) -> list[Feed]:
    draw = np.random.default_rng(1)
    return [{"x": draw.normal(size=(48, 16)).astype(dtype)} for _ in range(4)]


def large(folder: Path, dtype: type) -> Path:
    """Return two linears, the second of which reads values up to 240,000."""
    up, down = np.random.default_rng(0).normal(size=(2, 16, 16)) / 4
    nodes = "MatMul x up a, Mul a many b, Reshape b shape rows, MatMul rows down c, Relu c y"
    many, down = np.full(1, 6e4), 1e-3 * down
    return made(folder, dtype, nodes, up=up, many=many, down=down, shape=np.array([-1, 16]))


@pytest.mark.parametrize("sequential", ["none", "segment", "site"])
def test_values_beyond_float16_are_what_the_whole_computes(sequential: str, tmp_path: Path) -> None:
    """They pass a Reshape, for which ONNX Runtime has a kernel in float16."""
    path = large(tmp_path, np.float16)
    result = iobs_onnx.prune(
        path,
        calibration=rows(),
        sparsity="2:4",
        output=tmp_path / "sparse.onnx",
        sequential=sequential,
        provider="cpu",
    )
    assert result.report.runtime["float16"] == "computed in float32"
    kinds = [
        [value.type for value in (*graph.input, *graph.output)]
        for graph in (onnx.load(path).graph, onnx.load(tmp_path / "sparse.onnx").graph)
    ]
    assert kinds[0] == kinds[1]  # what is run is a copy
    before, after = (whole(p, rows()[0], [])["y"] for p in (path, tmp_path / "sparse.onnx"))
    error = np.linalg.norm(after.astype("f") - before) / np.linalg.norm(before.astype("f"))
    assert result.report.verification[0].relative_error == pytest.approx(error, rel=0.3)


def refused(path: Path, data: object, **options: object) -> str:
    """Prune what cannot be pruned, and return the message with the kind of error."""
    with pytest.raises((DataError, CheckError)) as caught:
        iobs_onnx.prune(path, calibration=data, sparsity="2:4", provider="cpu", **options)
    assert "\n" not in str(caught.value)
    return f"{type(caught.value).__name__}: {caught.value}"


def arrays(scale: float = 1.0) -> Feed:
    return {"x": np.concatenate([feed["x"] for feed in rows(np.float32)]) * np.float32(scale)}


def test_a_model_that_overflows_is_named(tmp_path: Path) -> None:
    """float32 ends at 3e38."""
    path = large(tmp_path, np.float32)
    said = refused(path, arrays(1e35), include=["down"])
    assert said.startswith("DataError: activation 'rows'")
    assert "holds Inf; output 'y' of the whole dense model is not finite either" in said
    once = refused(path, iter([arrays(1e35)] * 2), include=["down"])
    assert "holds Inf; these data are read once" in once
    small = refused(path, arrays(1e35), include=["down"], memory_budget=1000)
    assert "holds Inf; the whole model exceeds the memory budget" in small


def test_outputs_that_were_never_finite_are_not_laid_to_pruning(tmp_path: Path) -> None:
    """No linear reads what overflows."""
    w, v = np.random.default_rng(0).normal(size=(2, 16, 16))
    nodes = "MatMul x w a, Relu a b, MatMul b v c, Exp c y"
    path = made(tmp_path, np.float32, nodes, w=w, v=v)
    said = refused(path, arrays(100))
    assert said.startswith("DataError: output 'y' is not finite on held-out feeds, in the dense")


def test_a_model_whose_outputs_are_finite_is_not_blamed(tmp_path: Path) -> None:
    w, v = np.random.default_rng(0).normal(size=(2, 16, 16))
    nodes = "MatMul x w a, Sqrt a b, MatMul b v c, IsNaN c d, Where d none c y"
    path = made(tmp_path, np.float32, nodes, w=w, v=v, none=np.zeros(1))
    said = refused(path, arrays())
    assert said.startswith("DataError: activation 'b', batch 0: holds NaN; the whole model has it")
    assert said.endswith("outputs are finite all the same: exclude 'v'")
    result = iobs_onnx.prune(path, calibration=arrays(), sparsity="2:4", exclude=["v"])
    assert [site.name for site in result.report.sites] == ["w"]


@pytest.mark.parametrize("target", ["dense", "layer"])
def test_what_pruning_breaks_is_not_laid_to_the_model(target: str, tmp_path: Path) -> None:
    """The root of `x w − x w + 1`, of which one product is pruned."""
    w = np.random.default_rng(0).normal(size=(16, 16))
    nodes = "MatMul x w a, MatMul x v b, Sub a b c, Add c one d, Sqrt d e, MatMul e u y"
    path = made(tmp_path, np.float32, nodes, w=w, v=w, u=w, one=np.ones(1))
    said = refused(path, arrays(), exclude=["v"], target=target)
    assert said.startswith("CheckError: activation 'e', batch 0: holds NaN; the whole dense model")
    assert "finite there, so neither it nor the data are at fault" in said


def test_float16_that_cannot_hold_an_output_is_told(tmp_path: Path) -> None:
    w, v = np.random.default_rng(0).normal(size=(2, 16, 16))
    nodes = "MatMul x w a, Relu a b, MatMul b v c, Mul c many y"
    path = made(tmp_path, np.float16, nodes, w=w, v=v, many=np.full(1, 6e4))
    said = refused(path, rows())
    assert said.startswith("CheckError: output 'y' of the sparse model is not finite")
    assert "(float16 cannot hold what the whole model computes" in said
