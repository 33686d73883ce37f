"""Random small valid models around the operators that hold a matrix, with feeds for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import helper, numpy_helper

Feed = dict[str, np.ndarray]

# (IR version, opset) from the oldest that ONNX Runtime promises to run to the newest.
VERSIONS = ((3, 7), (3, 8), (4, 9), (5, 10), (6, 11), (7, 12), (8, 15), (9, 19), (10, 21), (13, 26))
_FORMS = ("initializer", "constant", "transposed", "identity", "half", "input", "sparse")
_ROWS = 12


class Drawn:
    """A model and two feeds; a failure prints its graph, not its weights.

    No dataclass, whose fields hypothesis would print in full.
    """

    def __init__(self, model: onnx.ModelProto, feeds: list[Feed]) -> None:
        self.model, self.feeds = model, feeds

    def __repr__(self) -> str:
        graph, opset = self.model.graph, self.model.opset_import[0].version
        lines = [f"IR version {self.model.ir_version}, opset {opset}"]
        lines += [f"{name} {array.shape} {array.dtype}" for name, array in self.feeds[0].items()]
        lines += [f"{tensor.name} {list(tensor.dims)}" for tensor in graph.initializer]
        lines += [
            f"{node.output[0]} = {node.op_type}({', '.join(node.input)})" for node in graph.node
        ]
        return "; ".join(lines)


@dataclass
class _Builder:
    """Collects a graph while layers are drawn; the current activation is `(rows, *shape)`."""

    rng: np.random.Generator
    ir_version: int
    opset: int
    dtype: type[np.generic]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    sparse: list[onnx.SparseTensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)
    count: int = 0

    @property
    def elem(self) -> int:
        return int(helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype)))

    def name(self, stem: str) -> str:
        self.count += 1
        return f"{stem}_{self.count}"

    def node(self, op: str, inputs: list[str], domain: str = "", **attributes: object) -> str:
        out = self.name(op.lower())
        self.nodes.append(
            helper.make_node(op, inputs, [out], self.name("n"), domain=domain, **attributes)
        )
        return out

    def tensor(self, array: np.ndarray, form: str = "initializer") -> str:
        """Store an array in one of the forms; return the value that holds it."""
        name = self.name("w")
        if form == "sparse" and self.ir_version >= 5:
            # Half of the values, so that pruning has something to decide.
            array = np.where(self.rng.random(array.shape) < 0.5, array, 0).astype(array.dtype)
            flat = np.flatnonzero(array)
            self.sparse.append(
                helper.make_sparse_tensor(
                    numpy_helper.from_array(array.reshape(-1)[flat], name),
                    numpy_helper.from_array(flat, f"{name}_indices"),
                    array.shape,
                )
            )
            return name
        if form == "constant":
            return self.node("Constant", [], value=numpy_helper.from_array(array, name))
        if form == "transposed" and array.ndim == 2:
            inner = self.tensor(np.ascontiguousarray(array.T))
            return self.node("Transpose", [inner], perm=[1, 0])
        if form == "identity":
            return self.node("Identity", [self.tensor(array)])
        if form == "half":
            return self.node("Cast", [self.tensor(array.astype(np.float16))], to=self.elem)
        tensor = numpy_helper.from_array(array, name)
        self.initializers.append(tensor)
        if form == "input" or self.ir_version < 4:
            kind = helper.make_tensor_value_info(name, tensor.data_type, array.shape)
            self.inputs.append(kind)
        return name

    def weight(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(self.dtype)


def _matmul(b: _Builder, value: str, shape: list[int], draw: st.DrawFn) -> tuple[str, list[int]]:
    out = draw(st.sampled_from((3, 4, 8)))
    form = draw(st.sampled_from(_FORMS))
    if len(shape) == 2 and draw(st.booleans()):
        # The weight on the left multiplies the columns of the activation.
        weight = b.tensor(b.weight(out, shape[0]), form)
        return b.node("MatMul", [weight, value]), [out, shape[1]]
    weight = b.tensor(b.weight(shape[-1], out), form)
    value = b.node("MatMul", [value, weight])
    if draw(st.booleans()):
        value = b.node("Add", [value, b.tensor(b.weight(out))])
    if shape[-1] == out and draw(st.booleans()):
        value = b.node("MatMul", [value, weight])
    return value, [*shape[:-1], out]


def _gemm(b: _Builder, value: str, shape: list[int], draw: st.DrawFn) -> tuple[str, list[int]]:
    if len(shape) != 1:
        return _matmul(b, value, shape, draw)
    out, turned = draw(st.sampled_from((4, 8))), draw(st.booleans())
    weight = b.weight(out, shape[0]) if turned else b.weight(shape[0], out)
    inputs = [value, b.tensor(weight, draw(st.sampled_from(_FORMS)))]
    if b.opset < 11 or draw(st.booleans()):
        inputs.append(b.tensor(b.weight(out)))
    attributes = {"transB": 1} if turned else {}
    if draw(st.booleans()):
        attributes |= {"alpha": 0.5, "beta": 2.0}
    return b.node("Gemm", inputs, **attributes), [out]


def _conv(b: _Builder, value: str, shape: list[int], draw: st.DrawFn) -> tuple[str, list[int]]:
    # ONNX Runtime has no convolution of float64.
    if len(shape) < 2 or b.dtype == np.float64:
        return _gemm(b, value, shape, draw)
    channels, *space = shape
    groups = draw(st.sampled_from([g for g in (1, 2) if channels % g == 0]))
    kernel = [draw(st.integers(1, 2)) for _ in space]
    out = 8
    weight = b.weight(out, channels // groups, *kernel)
    inputs = [value, b.tensor(weight, draw(st.sampled_from(_FORMS)))]
    if draw(st.booleans()):
        inputs.append(b.tensor(b.weight(out)))
    attributes: dict[str, object] = {"group": groups} if groups > 1 else {}
    if draw(st.booleans()):
        attributes["kernel_shape"] = kernel
    if draw(st.booleans()):
        attributes["auto_pad"] = "SAME_UPPER"
        new = list(space)
    else:
        attributes["pads"] = [1] * 2 * len(space)
        new = [n + 2 - k + 1 for n, k in zip(space, kernel, strict=True)]
    return b.node("Conv", inputs, **attributes), [out, *new]


def _plain(b: _Builder, value: str, shape: list[int], draw: st.DrawFn) -> tuple[str, list[int]]:
    op = draw(st.sampled_from(("Relu", "Tanh", "Sigmoid", "Transpose", "twice")))
    if op == "Transpose":
        axes = list(range(1, len(shape) + 1))[::-1]
        return b.node(op, [value], perm=[0, *axes]), shape[::-1]
    if op == "twice":
        # Two readers of one value.
        return b.node("Add", [value, b.node("Tanh", [value])]), shape
    return b.node(op, [value]), shape


def _body(b: _Builder, value: str, shape: list[int], draw: st.DrawFn) -> tuple[str, list[int]]:
    """A product in a body of If, Loop or Scan, its weight inside or captured."""
    kind = draw(st.sampled_from(("If", "Loop", "Scan") if b.opset >= 9 else ("If", "Loop")))
    width = shape[-1] if kind == "Loop" else draw(st.sampled_from((4, 8)))
    outer = b.nodes
    form = draw(st.sampled_from(("initializer", "constant", "identity")))
    # Before IR version 4 initializers of a body are inputs of it, which If has none of.
    inside = draw(st.booleans()) and (b.ir_version >= 4 or form == "constant")
    weight = "" if inside else b.tensor(b.weight(shape[-1], width), form)
    count, b.nodes, tensors = b.name("count"), [], len(b.initializers)
    state = value if kind == "If" else b.name("state")
    weight = weight or b.tensor(b.weight(shape[-1], width), form)
    made = b.node("Tanh", [b.node("MatMul", [state, weight])])
    inner, b.nodes = b.nodes, outer
    held, b.initializers = b.initializers[tensors:], b.initializers[:tensors]

    def info(name: str, kind: int = b.elem, dims: list[int] | None = None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, dims)

    def graph(nodes, inputs, outputs, initializers) -> onnx.GraphProto:
        return helper.make_graph(nodes, b.name("body"), inputs, outputs, initializers)

    if kind == "If":
        other = helper.make_node("MatMul", [value, b.tensor(b.weight(shape[-1], width))], [count])
        branches = [graph(inner, [], [info(made)], held), graph([other], [], [info(count)], [])]
        then, els = branches if draw(st.booleans()) else branches[::-1]
        flag = b.tensor(np.array(draw(st.booleans())))
        return b.node("If", [flag], then_branch=then, else_branch=els), [*shape[:-1], width]
    if kind == "Scan":
        run = graph(inner, [info(state, dims=shape)], [info(made)], held)
        return b.node("Scan", [value], num_scan_inputs=1, body=run), [*shape[:-1], width]
    boolean, go = onnx.TensorProto.BOOL, b.name("go")
    inputs = [info(count, onnx.TensorProto.INT64, []), info(go, boolean, []), info(state)]
    on = helper.make_node("Identity", [go], [f"{go}_on"])
    run = graph([*inner, on], inputs, [info(f"{go}_on", boolean), info(made)], held)
    return b.node("Loop", [b.tensor(np.array(2)), "", value], body=run), shape


_LAYERS: tuple[Callable[..., tuple[str, list[int]]], ...] = (
    _matmul,
    _gemm,
    _conv,
    _plain,
    _body,
)


@st.composite
def models(draw: st.DrawFn) -> Drawn:
    """Draw a model that ONNX's checker passes, and two feeds."""
    ir_version, opset = draw(st.sampled_from(VERSIONS))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    b = _Builder(rng, ir_version, opset, draw(st.sampled_from((np.float32, np.float64))))
    shape = list(draw(st.sampled_from(((8,), (4, 8), (8, 5), (4, 5, 6)))))
    # A constant or dynamic batch, and rows enough for every Hessian to have full rank.
    batch = draw(st.sampled_from(("batch", _ROWS)))
    b.inputs.append(helper.make_tensor_value_info("x", b.elem, [batch, *shape]))
    feeds = [{"x": rng.standard_normal((_ROWS, *shape)).astype(b.dtype)} for _ in range(2)]
    value = "x"
    for _ in range(draw(st.integers(0, 4))):
        value, shape = draw(st.sampled_from(_LAYERS))(b, value, shape, draw)
    value = b.node("Identity", [value])
    graph = helper.make_graph(
        b.nodes,
        draw(st.sampled_from(("g", "main graph", "ünïcode"))),
        b.inputs,
        [helper.make_tensor_value_info(value, b.elem, ["rows", *([None] * len(shape))])],
        b.initializers,
        sparse_initializer=b.sparse,
    )
    model = helper.make_model(
        graph, ir_version=ir_version, opset_imports=[helper.make_opsetid("", opset)]
    )
    onnx.checker.check_model(model)
    return Drawn(model, feeds)
