"""Which lengths follow from stored numbers: by table, and against two runs with other numbers."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from iobs_onnx.passes import moving_lengths

HEAD = """<ir_version: 8, opset_import: ["" : 17]>
g (float[t, 4] x, bool[t] given) => (float[m, 4] y)
<float[4, 4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, int64[1] last = {-1}, int64[1] one = {1}>
"""


@pytest.mark.parametrize(
    ("body", "moving"),
    [
        ("h = MatMul(x, w) y = Relu(h)", ""),
        # What is given decides in both models alike.
        ("h = MatMul(x, w) y = Compress <axis = 0> (h, given)", ""),
        (
            "h = MatMul(x, w) s = ReduceSum <keepdims = 0> (h, last) k = Cast <to = 9> (s) "
            "p = Compress <axis = 0> (h, k) y = Relu(p)",
            "p y",
        ),
        # A shape that is asked of what does not move is no number that weights give.
        ("h = MatMul(x, w) n = Shape(h) y = Reshape(h, n)", ""),
        (
            "h = MatMul(x, w) i = NonZero(h) n = Shape(i) z = ConstantOfShape(n) y = Identity(z)",
            "i z y",
        ),
        # Experts: rows are picked by weights, and put back where they came from.
        (
            "h = MatMul(x, w) i = NonZero(h) j = Transpose(i) k = CastLike(j, one) "
            "u = GatherND(h, k) y0 = ScatterND(h, k, u) y = Relu(y0)",
            "i j k u",
        ),
        (
            "h = MatMul(x, w) m = ReduceMax <keepdims = 0> (h) c = Cast <to = 7> (m) "
            "r = Reshape(c, one) y = Tile(x, r)",
            "y",
        ),
    ],
)
def test_moving_lengths(body: str, moving: str) -> None:
    lines = "\n".join(f"{part}" for part in body.split("\n"))
    model = ir.from_onnx_text(f"{HEAD}{{ {lines} }}")
    assert moving_lengths(model, ["w"]) == set(moving.split())
    assert moving_lengths(model, []) == set()


def test_axes_named_like_an_input_s_do_not_move() -> None:
    body = "h = MatMul(x, w) i = NonZero(h) j = Transpose(i) u = GatherND(h, j) y = Relu(u)"
    text = f"{HEAD}{{ {body} }}".replace("float[m, 4] y", "float[t, 4] y")
    assert "y" not in moving_lengths(ir.from_onnx_text(text), ["w"])
