"""Weights that are replaced, values that are asked for, bodies, memory and errors."""

from __future__ import annotations

import weakref

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from iobs_onnx.errors import DataError, ModelError
from iobs_onnx.runtime.differentiable import Difference, Evaluator, agreement, unsupported
from iobs_onnx.runtime.differentiable.products import bfloat16_factors, stacked_product
from iobs_onnx.runtime.differentiable.products import product as one_product

RNG = np.random.default_rng(2)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def node(op_type, inputs, outputs, **attributes):
    return helper.make_node(op_type, inputs.split(), outputs.split(), **attributes)


def leaf(value):
    return torch.as_tensor(value).clone().requires_grad_()


def test_gradient_passes_transpose_cast_and_multiplication(make):
    w = normal(5, 4).astype(np.float16)
    nodes = [
        node("Transpose", "w", "t"),
        node("Cast", "t", "c", to=TensorProto.FLOAT),
        node("Mul", "c scale", "m"),
        node("MatMul", "x m", "y"),
    ]
    x, scale = normal(3, 4), normal(5)
    evaluator = Evaluator(make(nodes, {"x": x}, {"w": w, "scale": scale}))
    weight = leaf(evaluator.weight("w").float())
    y = evaluator({"x": torch.from_numpy(x)}, {"w": weight})["y"]
    np.testing.assert_allclose(y.detach(), x @ (w.astype(np.float32).T * scale), rtol=2e-3)
    y.sum().backward()
    expected = np.outer(scale, x.sum(0))
    np.testing.assert_allclose(weight.grad, expected, rtol=1e-5)


def test_gradient_reaches_what_is_dequantized(make):
    w = RNG.integers(-128, 128, (4, 5)).astype(np.int8)
    scale = (RNG.random(5) + 0.5).astype(np.float32)
    nodes = [node("DequantizeLinear", "w scale", "d"), node("MatMul", "x d", "y")]
    x = normal(3, 4)
    evaluator = Evaluator(make(nodes, {"x": x}, {"w": w, "scale": scale}))
    given = {"x": torch.from_numpy(x)}
    plain = evaluator(given)["y"]
    weights = {"w": leaf(w.astype(np.float32)), "scale": leaf(scale)}
    y = evaluator(given, weights)["y"]
    torch.testing.assert_close(y.detach(), plain)
    y.sum().backward()
    np.testing.assert_allclose(weights["w"].grad, np.outer(x.sum(0), scale), rtol=1e-5)
    np.testing.assert_allclose(weights["scale"].grad, (x @ w).sum(0), rtol=1e-4)


def test_rounding_passes_the_gradient_and_saturation_stops_it(make):
    nodes = [
        node("QuantizeLinear", "x scale zero", "q"),
        node("Reshape", "q shape", "r"),
        node("DequantizeLinear", "r scale zero", "y"),
    ]
    weights = {"scale": np.float32(0.1), "zero": np.uint8(100), "shape": np.array([2, 2])}
    x = np.float32([0.234, -3.14, 99.0, -99.0])
    model = make(nodes, {"x": x}, weights, ["y", "q"])
    model.graph.outputs[1].type = ir.TensorType(ir.DataType.UINT8)
    evaluator = Evaluator(model)
    given = leaf(x)
    found = evaluator({"x": given})
    assert found["q"].dtype == torch.uint8  # as the model declares it, although floats are carried
    found["y"].sum().backward()
    assert given.grad.tolist() == [1.0, 1.0, 0.0, 0.0]
    with torch.no_grad():
        torch.testing.assert_close(evaluator({"x": given})["y"], found["y"].detach())
    assert agreement(model, [{"x": x}], tolerance=1e-6).ok


@pytest.mark.parametrize("op", ["MatMulInteger", "QLinearMatMul"])
def test_gradient_passes_products_of_quantized_values(op, make):
    x, w = normal(3, 64), RNG.integers(-128, 128, (64, 5)).astype(np.int8)
    quantize = node("QuantizeLinear", "x s z", "q")
    scalars = {"s": np.float32(0.02), "z": np.uint8(128), "wz": np.int8(0)}
    if op == "MatMulInteger":
        nodes = [
            quantize,
            node(op, "q w z wz", "i"),
            node("Cast", "i", "c", to=TensorProto.FLOAT),
            node("Mul", "c s", "y"),
        ]
    else:
        scalars |= {"ws": np.float32(1), "ys": np.float32(30), "yz": np.uint8(128)}
        nodes = [
            quantize,
            node(op, "q s z w ws wz ys yz", "i"),
            node("DequantizeLinear", "i ys yz", "y"),
        ]
    model = make(nodes, {"x": x}, {"w": w, **scalars})
    given = leaf(x)
    y = Evaluator(model)({"x": given})["y"]
    y.sum().backward()
    # What is rounded or saturated apart, this is a matrix product.
    inside = ((x > -2.56) & (x < 2.54)).astype(np.float32)
    expected = inside * w.astype(np.float32).sum(1)
    np.testing.assert_allclose(given.grad, expected, rtol=1e-4, atol=1e-4)
    assert agreement(model, [{"x": x}], tolerance=1e-2).ok


def test_tied_embedding_gets_both_contributions(make):
    table = normal(7, 4)
    nodes = [
        node("Gather", "table ids", "e"),
        node("Tanh", "e", "h"),
        node("Transpose", "table", "t"),
        node("MatMul", "h t", "y"),
    ]
    ids = np.array([[1, 5, 1]])
    evaluator = Evaluator(make(nodes, {"ids": ids}, {"table": table}))
    weight, reference = leaf(table), leaf(table)
    evaluator({"ids": torch.from_numpy(ids)}, {"table": weight})["y"].square().sum().backward()
    (torch.tanh(reference[torch.from_numpy(ids)]) @ reference.T).square().sum().backward()
    torch.testing.assert_close(weight.grad, reference.grad)


def test_constant_nodes_can_be_replaced(make):
    w = normal(4, 5)
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(w)),
        node("MatMul", "x w", "y"),
    ]
    x = normal(3, 4)
    evaluator = Evaluator(make(nodes, {"x": x}))
    torch.testing.assert_close(evaluator.weight("w"), torch.from_numpy(w))
    weight = leaf(evaluator.weight("w"))
    evaluator({"x": torch.from_numpy(x)}, {"w": weight})["y"].sum().backward()
    np.testing.assert_allclose(weight.grad, np.repeat(x.sum(0)[:, None], 5, 1), rtol=1e-5)


def branch(name, weight):
    value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], [f"c{name}"], value=numpy_helper.from_array(weight)),
            node("MatMul", f"x c{name}", f"p{name}"),
            node("Add", f"p{name} b", name),
        ],
        name,
        [],
        [value],
        [],
    )
    return graph


def test_branches_capture_and_their_weights_are_replaced(make):
    first, second, b = normal(4, 4), normal(4, 4), normal(4)
    nodes = [
        node("ReduceSum", "x", "sum", keepdims=0),
        node("Greater", "sum zero", "positive"),
        node(
            "If",
            "positive",
            "y",
            then_branch=branch("first", first),
            else_branch=branch("second", second),
        ),
    ]
    x = normal(2, 4)
    model = make(nodes, {"x": x}, {"b": b, "zero": np.float32(0)})
    assert agreement(model, [{"x": x}, {"x": -x}]).ok
    evaluator = Evaluator(model)
    weights = {"cfirst": leaf(first), "csecond": leaf(second), "b": leaf(b)}
    taken, other = ("cfirst", "csecond") if x.sum() > 0 else ("csecond", "cfirst")
    evaluator({"x": torch.from_numpy(x)}, weights)["y"].sum().backward()
    np.testing.assert_allclose(
        weights[taken].grad, np.repeat(x.sum(0)[:, None], 4, 1), rtol=1e-4, atol=1e-6
    )
    assert weights[other].grad is None
    assert weights["b"].grad.tolist() == [2.0] * 4


def test_gradient_passes_a_loop(make):
    body = helper.make_graph(
        [
            node("MatMul", "h w", "p"),
            node("Tanh", "p", "next"),
            node("Identity", "going", "again"),
            node("Identity", "next", "shown"),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("again", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("shown", TensorProto.FLOAT, None),
        ],
    )
    loop = helper.make_node("Loop", ["count", "", "x"], ["y", "all"], body=body)
    x, w = normal(2, 4), normal(4, 4)
    model = make([loop], {"x": x}, {"w": w, "count": np.array(3)}, ["y", "all"])
    assert agreement(model, [{"x": x}]).ok
    weight, reference = leaf(w), leaf(w)
    found = Evaluator(model)({"x": torch.from_numpy(x)}, {"w": weight})
    found["y"].sum().backward()
    h = torch.from_numpy(x)
    for _ in range(3):
        h = torch.tanh(h @ reference)
    h.sum().backward()
    torch.testing.assert_close(weight.grad, reference.grad)
    assert found["all"].shape == (3, 2, 4)


@pytest.fixture
def chain(make):
    """Twenty times `tanh(x w)`, values h1 to h20."""
    nodes, before = [], "x"
    for step in range(1, 21):
        nodes += [node("MatMul", f"{before} w", f"p{step}"), node("Tanh", f"p{step}", f"h{step}")]
        before = f"h{step}"
    nodes.append(node("Identity", before, "y"))
    return make(nodes, {"x": normal(2, 4)}, {"w": normal(4, 4)})


def test_any_value_can_be_an_output(chain):
    x = torch.from_numpy(normal(2, 4))
    evaluator = Evaluator(chain)
    found = evaluator({"x": x}, outputs=["h3", "y", "p1", "w", "x"])
    w = evaluator.weight("w")
    torch.testing.assert_close(found["p1"], x @ w)
    torch.testing.assert_close(found["h3"], torch.tanh(torch.tanh(torch.tanh(x @ w) @ w) @ w))
    assert found["w"] is w
    assert found["x"] is x
    # What is not needed is not run: no input is asked for.
    assert evaluator({}, outputs=["w"])["w"] is w


def test_values_are_freed_after_their_last_reader(chain, monkeypatch):
    alive, most = weakref.WeakSet(), []
    tanh = torch.tanh

    def watched(x):
        y = tanh(x)
        alive.add(y)
        most.append(len(alive))
        return y

    from iobs_onnx.runtime.differentiable import program
    from iobs_onnx.runtime.differentiable.elementwise import unary

    monkeypatch.setitem(program.OPERATORS, ("", "Tanh"), unary(watched))
    with torch.no_grad():
        Evaluator(chain)({"x": torch.zeros(2, 4)})
    assert max(most) <= 2


def test_checkpoints_change_memory_and_nothing_else(chain):
    x = torch.from_numpy(normal(2, 4))
    results, saved = [], []
    for checkpoint in (False, True):
        evaluator = Evaluator(chain, checkpoint=checkpoint)
        w = leaf(evaluator.weight("w"))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t
        ):
            y = evaluator({"x": x}, {"w": w})["y"]
        y.sum().backward()
        saved.append(sum(kept))
        results.append((y.detach(), w.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert saved[1] < saved[0] / 2


def test_precision_of_half_models(make):
    w, x = normal(8, 8).astype(np.float16), normal(4, 8).astype(np.float16)
    nodes = [node("MatMul", "x w", "p"), node("Softmax", "p", "y", axis=-1)]
    model = make(nodes, {"x": x}, {"w": w})
    given = {"x": torch.from_numpy(x)}
    own, wide = Evaluator(model), Evaluator(model, precision="float32")
    assert own(given)["y"].dtype == own.weight("w").dtype == torch.float16
    assert wide(given)["y"].dtype == wide.weight("w").dtype == torch.float32
    assert agreement(model, [{"x": x}]).ok
    assert agreement(model, [{"x": x}], precision="float32").ok
    weight = leaf(own.weight("w").float())
    wide(given, {"w": weight})["y"].square().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_functions_of_the_model_are_evaluated():
    square = helper.make_function(
        "own", "Square", ["a"], ["b"], [node("Mul", "a a", "b")], [helper.make_opsetid("", 21)]
    )
    graph = helper.make_graph(
        [helper.make_node("Square", ["x"], ["y"], domain="own")],
        "functions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])],
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    proto = helper.make_model(graph, functions=[square], opset_imports=domains, ir_version=10)
    model = ir.from_proto(proto)
    assert not unsupported(model)
    assert Evaluator(model)({"x": torch.tensor([1.0, 2.0, 3.0])})["y"].tolist() == [1, 4, 9]
    assert model.functions  # the model is left as it was


def test_a_default_is_used_until_the_input_is_given():
    graph = helper.make_graph(
        [node("Add", "x b", "y")],
        "defaults",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, [2]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.float32([1, 2]), "b")],
    )
    domains = [helper.make_opsetid("", 21)]
    evaluator = Evaluator(ir.from_proto(helper.make_model(graph, opset_imports=domains)))
    x = torch.zeros(2)
    assert evaluator.inputs == ["x"]
    assert evaluator({"x": x})["y"].tolist() == [1, 2]
    assert evaluator({"x": x, "b": torch.ones(2)})["y"].tolist() == [1, 1]


def test_what_is_unsupported_is_named(make):
    nodes = [
        helper.make_node("StringNormalizer", ["x"], ["s"], name="lower"),
        helper.make_node("Secret", ["x"], ["t"], name="magic", domain="acme"),
        node("Relu", "x", "y"),
    ]
    model = make(nodes, {"x": normal(2)})
    assert unsupported(model) == [
        "node 'lower' (ai.onnx::StringNormalizer): there is no such operator here",
        "node 'magic' (acme::Secret): there is no such operator here",
    ]
    with pytest.raises(ModelError, match=r"torch: node 'lower' .* here \(and 1 more\)$"):
        Evaluator(model)


def test_errors_name_the_node_in_one_line(make):
    multiply = helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")
    evaluator = Evaluator(make([multiply], {"x": normal(3, 4)}, {"w": normal(4, 5)}))
    with pytest.raises(ModelError, match=r"^node 'layer' \(ai.onnx::MatMul\): .*shapes") as raised:
        evaluator({"x": torch.zeros(3, 7)})
    assert "\n" not in str(raised.value)
    with pytest.raises(ModelError, match="input 'x' of the model is missing"):
        evaluator({})
    with pytest.raises(ModelError, match="no initializer or Constant node 'v'"):
        evaluator({"x": torch.zeros(3, 4)}, {"v": torch.zeros(1)})
    with pytest.raises(ModelError, match="the main graph has no value 'z'"):
        evaluator({"x": torch.zeros(3, 4)}, outputs=["z"])


def test_disagreement_is_named(make, monkeypatch):
    x = normal(3, 4)
    model = make([node("Relu", "x", "y")], {"x": x})
    with pytest.raises(DataError, match="no feeds"):
        agreement(model, [])
    from iobs_onnx.runtime.differentiable import program

    monkeypatch.setitem(program.OPERATORS, ("", "Relu"), lambda context, x: x.relu() * 1.01)
    found = agreement(model, [{"x": x}])
    assert not found.ok
    assert found.reason.startswith("output 'y' differs from ONNX Runtime's by 1.0e-02 of its norm")
    (one,) = found.differences
    assert one == Difference("y", pytest.approx(0.01 * x.max(), rel=1e-3), one.relative, 1e-3)
    integers = make([node("Shape", "x", "y")], {"x": x})
    with pytest.raises(ModelError, match="no float output"):
        agreement(integers, [{"x": x}])


def test_large_products_are_exact_and_twice_differentiable():
    a = torch.randn(64, 300, requires_grad=True)
    b = torch.randn(80, 300, requires_grad=True)
    y = one_product(a, b.t())
    torch.testing.assert_close(y, a @ b.t(), rtol=1e-5, atol=1e-4)
    found = torch.autograd.grad(y.square().sum(), (a, b), create_graph=True)
    expected = torch.autograd.grad((a @ b.t()).square().sum(), (a, b), create_graph=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-2)
    again = torch.autograd.grad(found[0].square().sum(), b)
    twice = torch.autograd.grad(expected[0].square().sum(), b)
    torch.testing.assert_close(again, twice, rtol=1e-4, atol=1e2)


def test_shapes_are_computed_with_sizes_of_the_call(make):
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "batch"),
        node("Unsqueeze", "batch axes", "first"),
        node("Concat", "first rest", "target", axis=0),
        node("Reshape", "x target", "y"),
    ]
    weights = {"zero": np.array(0), "axes": np.array([0]), "rest": np.array([-1])}
    evaluator = Evaluator(make(nodes, {"x": normal(2, 3, 4)}, weights))
    assert evaluator({"x": torch.zeros(2, 3, 4)})["y"].shape == (2, 12)
    assert evaluator({"x": torch.zeros(5, 1, 7)})["y"].shape == (5, 7)


@pytest.mark.parametrize("stack", [(), (2, 3)], ids=["matrices", "stacks"])
def test_rounded_factors_err_by_their_rounding_and_only_where_asked(stack):
    a = torch.randn(*stack, 64, 300, requires_grad=True)
    b = torch.randn(*stack, 300, 80, requires_grad=True)
    product = stacked_product if stack else one_product
    exact = torch.autograd.grad((a @ b).square().sum(), (a, b))
    with bfloat16_factors():
        y = product(a, b)
        small = product(a[..., :4, :], b)
    found = torch.autograd.grad(y.square().sum(), (a, b))
    # Two factors of 8 significant bits, each off by up to 2^-9 of itself.
    for one, other in ((y, a @ b), *zip(found, exact, strict=True)):
        error = float(((one - other).norm() / other.norm()).detach())
        assert 2**-14 < error < 2**-7
    torch.testing.assert_close(small, a[..., :4, :] @ b, rtol=1e-5, atol=1e-4)
    assert product(a, b).dtype == y.dtype == torch.float32
    torch.testing.assert_close(product(a, b), a @ b, rtol=1e-5, atol=1e-4)
    with bfloat16_factors(False):
        torch.testing.assert_close(product(a, b), a @ b, rtol=1e-5, atol=1e-4)
