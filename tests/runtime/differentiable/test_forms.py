"""Forms of operators that the onnx package has no case for, against ONNX Runtime."""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np
import pytest
from node_cases import Case

RNG = np.random.default_rng(1)
Form = partial(Case, domain="")


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def positive(*shape):
    return (RNG.random(shape) + 0.5).astype(np.float32)


X1, X2, X3 = normal(2, 4, 11), normal(2, 4, 9, 11), normal(2, 4, 5, 6, 7)
CONVOLUTIONS = [
    Form("Conv", [X1, normal(6, 4, 3), normal(6)], {"strides": [2], "pads": [2, 1]}, note="1-D"),
    Form("Conv", [X3, normal(6, 2, 2, 3, 3)], {"group": 2, "dilations": [1, 2, 1]}, note="3-D"),
    Form("Conv", [X2, normal(4, 1, 3, 3)], {"group": 4, "pads": [0, 1, 2, 3]}, note="depthwise"),
    Form(
        "Conv",
        [X2, normal(6, 4, 3, 2)],
        {"auto_pad": "SAME_UPPER", "strides": [2, 3]},
        note="same upper",
    ),
    Form(
        "Conv",
        [X2, normal(6, 4, 4, 2)],
        {"auto_pad": "SAME_LOWER"},
        note="same lower",
    ),
    Form("Conv", [X2, normal(6, 4, 3, 2)], {"auto_pad": "VALID"}, note="valid"),
    Form(
        "ConvTranspose",
        [X2, normal(4, 3, 3, 2), normal(6)],
        {"group": 2, "strides": [2, 3], "pads": [1, 0, 1, 0], "output_padding": [1, 2]},
        note="groups",
    ),
    Form(
        "ConvTranspose",
        [X1, normal(4, 3, 4), normal(3)],
        {"strides": [3], "pads": [2, 1], "output_padding": [2]},
        note="uneven",
    ),
    Form(
        "ConvTranspose",
        [X2, normal(4, 3, 3, 3)],
        {"strides": [2, 2], "output_shape": [18, 23]},
        note="output shape",
    ),
]
POOLS = [
    Form(op, [X2], {"kernel_shape": [3, 2], "strides": [2, 2], **options}, note=note)
    for op in ("MaxPool", "AveragePool", "LpPool")
    for note, options in {
        "plain": {},
        "ceil": {"ceil_mode": 1},
        "padded": {"pads": [1, 0, 1, 1]},
        "ceil padded": {"ceil_mode": 1, "pads": [1, 1, 0, 1]},
        "same": {"auto_pad": "SAME_LOWER"},
        "dilated": {"dilations": [2, 3], "pads": [1, 1, 1, 1]},
    }.items()
]
POOLS += [
    Form(
        "AveragePool",
        [X2],
        {"kernel_shape": [3, 2], "strides": [2, 3], "count_include_pad": 1, **options},
        note=f"counting {options}",
    )
    for options in ({"pads": [1, 0, 2, 1]}, {"pads": [1, 1, 0, 1], "ceil_mode": 1})
]
POOLS += [
    Form("MaxPool", [X1], {"kernel_shape": [3], "pads": [1, 1]}, ("y", "places"), note="places"),
    Form("MaxPool", [X3], {"kernel_shape": [2, 2, 2], "dilations": [1, 2, 3]}, note="3-D"),
    Form("GlobalLpPool", [X2], {"p": 3}),
    Form("GlobalMaxPool", [X3]),
    Form("GlobalAveragePool", [X1]),
]


def recurrent(op, gates, note, lengths=None, state=False, peepholes=False, **attributes):
    """A case of 5 steps of 3 samples: 4 features, 6 hidden."""
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    x = normal(5, 3, 4)
    inputs = [
        x.swapaxes(0, 1).copy() if attributes.get("layout") else x,
        normal(directions, gates * 6, 4) / 2,
        normal(directions, gates * 6, 6) / 2,
        normal(directions, gates * 12) / 2,
        None if lengths is None else np.array(lengths, np.int32),
        normal(directions, 3, 6) if state else None,
    ]
    outputs = ["y", "h"]
    if op == "LSTM":
        inputs += [normal(directions, 3, 6) if state else None]
        inputs += [normal(directions, 18)] if peepholes else []
        outputs += ["c"]
    return Form(op, inputs, {"hidden_size": 6, **attributes}, tuple(outputs), (1, 2, 3), note)


BOTH = {"direction": "bidirectional"}
RECURRENT = [
    recurrent(op, gates, f"{note} {op}", **options)
    for op, gates in (("RNN", 1), ("GRU", 3), ("LSTM", 4))
    for note, options in {
        "plain": {},
        "reverse": {"direction": "reverse", "state": True},
        "both": {**BOTH, "state": True},
        "lengths": {**BOTH, "lengths": (5, 2, 3), "state": True},
        "clip": {"clip": 0.4},
    }.items()
]
RECURRENT += [
    recurrent("GRU", 3, "after", linear_before_reset=1, lengths=(5, 2, 3), **BOTH),
    recurrent("LSTM", 4, "peepholes", peepholes=True, state=True, **BOTH),
    recurrent("LSTM", 4, "coupled", input_forget=1, state=True),
    recurrent(
        "LSTM",
        4,
        "activations",
        activations=["HardSigmoid", "LeakyRelu", "Softsign"],
        activation_alpha=[0.3, 0.1],
        activation_beta=[0.4],
    ),
    recurrent("RNN", 1, "activations", activations=["Affine"], activation_alpha=[0.3]),
]

SCALES = np.float32([1, 1, 1.7, 2.3])
EMPTY = np.float32([])
RESIZES = [
    Form(
        "Resize",
        [X2, None, SCALES],
        {"mode": mode, "coordinate_transformation_mode": coordinates},
        frozen=(2,),
        note=f"{mode} {coordinates}",
    )
    for mode in ("nearest", "linear", "cubic")
    for coordinates in (
        *("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"),
        "half_pixel_symmetric",
    )
    if (mode, coordinates) != ("nearest", "half_pixel_symmetric")
]
RESIZES += [
    Form("Resize", [X2, None, None, np.array([2, 4, 18, 33])], {"mode": mode}, note=f"{mode} sizes")
    for mode in ("nearest", "linear", "cubic")
]
RESIZES += [
    Form("Resize", [X3, None, np.float32([1, 1, 2, 1.5, 2])], {"mode": "linear"}, note="volume"),
    Form(
        "Resize",
        [X2, None, np.float32([1, 1, 0.5, 0.6])],
        {"mode": "linear", "antialias": 1},
        note="antialias",
    ),
    Form("Upsample", [X2, np.float32([1, 1, 2, 3])], {"mode": "nearest"}, opset=9, note="nearest"),
    Form("Upsample", [X2, np.float32([1, 1, 2, 3])], {"mode": "linear"}, opset=9, note="linear"),
    Form("Resize", [X2, np.float32([1, 1, 2, 3])], {"mode": "nearest"}, opset=10, note="10"),
    Form("Resize", [X2, np.float32([1, 1, 0.6, 0.5])], {}, opset=10, note="10 down"),
]

OLD = [
    Form("Clip", [X1], {"min": -0.5, "max": 0.3}, opset=7),
    Form("Dropout", [X1], {"ratio": 0.5}, opset=7),
    Form("Pad", [X2], {"pads": [0, 0, 1, 2, 0, 1, 0, 3], "value": 0.5}, opset=7),
    Form("Pad", [X2], {"pads": [0, 0, 1, 2, 0, 0, 0, 3], "mode": "reflect"}, opset=7, note="ed"),
    Form("ReduceSum", [X2], {"axes": [1, -1], "keepdims": 0}, opset=11),
    Form("ReduceMean", [X2], {"axes": [2]}, opset=13),
    Form("Slice", [X2], {"starts": [1, -3], "ends": [9, 10000], "axes": [2, 3]}, opset=9),
    Form("Softmax", [X2], {"axis": 2}, opset=11),
    Form("Softmax", [X2], {}, opset=11, note="default"),
    Form("LogSoftmax", [X2], {"axis": 1}, opset=11),
    Form("Hardmax", [X2], {"axis": 1}, opset=11),
    Form("Split", [X2], {"axis": 1, "split": [1, 3]}, ("y", "z"), opset=11),
    Form("Split", [X2], {"axis": 1}, ("y", "z"), opset=11, note="even"),
    Form("Squeeze", [normal(1, 3, 1)], {"axes": [0, -1]}, opset=11),
    Form("Unsqueeze", [X1], {"axes": [0, 3]}, opset=11),
    Form("TopK", [X1], {"k": 3, "axis": 1}, ("y", "places"), opset=9),
    Form("BatchNormalization", [X2, *(normal(4) for _ in range(3)), positive(4)], {}, opset=9),
    Form("Flatten", [X2], {"axis": 2}, opset=9),
    Form("GroupNormalization", [X2, normal(2), normal(2)], {"num_groups": 2}, opset=18),
    Form("Scatter", [X1, np.zeros((1, 4, 2), np.int64), normal(1, 4, 2)], {"axis": 2}, opset=10),
]

OTHERS = [
    Form("Slice", [X2, *(np.array([v]) for v in (-2, -100, 3, -2))], note="backwards"),
    Form("Pad", [X2, np.array([0, 0, 0, -1, 0, 0, 3, 2])], {"mode": "edge"}, note="edge"),
    Form("Pad", [X2, np.array([0, 0, 2, -1, 0, 0, 3, 2])], {"mode": "wrap"}, note="wrap"),
    Form("Pad", [X2, np.array([0, 0, 2, -1, 0, 0, 3, 2])], {"mode": "reflect"}, note="reflect"),
    Form("LRN", [X2], {"size": 3, "alpha": 0.3, "beta": 0.6, "bias": 2.0}),
    Form("Gemm", [normal(5, 3), normal(5, 4), normal(3, 1)], {"transA": 1, "alpha": 0.3}),
    Form("MatMul", [normal(2, 3, 4), normal(4)], note="vector"),
    Form("MatMul", [normal(4), normal(2, 4, 3)], note="vector first"),
    Form("MatMul", [normal(1, 2, 3, 4), normal(5, 1, 4, 3)], note="batches"),
    Form("MatMul", [normal(2, 64, 256), normal(256, 128)], note="large"),
    Form("Einsum", [normal(2, 3, 4), normal(2, 4, 5)], {"equation": "bij, bjk -> bik"}),
    Form("InstanceNormalization", [X1, normal(4), normal(4)]),
    Form("LayerNormalization", [X2, normal(9, 11), normal(9, 11)], {"axis": 2}),
    Form("LayerNormalization", [X1, normal(11)], {}, ("y", "mean", "deviation"), note="all"),
    Form("GridSample", [X2, normal(2, 3, 5, 2)], {"mode": "cubic"}),
]


@pytest.mark.parametrize(
    "case", [*CONVOLUTIONS, *POOLS, *RECURRENT, *RESIZES, *OLD, *OTHERS], ids=str
)
def test_agrees_with_onnx_runtime(case, make):
    case.hold(make, tolerance=2e-6)


@pytest.mark.parametrize("case", [*CONVOLUTIONS, *POOLS, *RECURRENT, *OTHERS], ids=str)
def test_gradients_are_those_of_the_function(case, make):
    case.differentiate(make)


@pytest.mark.parametrize("case", RESIZES, ids=str)
def test_gradients_of_resized_images(case, make):
    case.differentiate(make, held=("i1", "i2"))


def eight_bits(*shape):
    return RNG.integers(-128, 128, shape).astype(np.int8)


QUANTIZED = [
    Form("DequantizeLinear", [eight_bits(4, 6), positive(6), eight_bits(6)], {"axis": 1}),
    Form("DequantizeLinear", [eight_bits(4, 6), positive(4)], {"axis": -2}, note="row"),
    Form(
        "DequantizeLinear",
        [RNG.integers(-8, 8, (4, 6)).astype(ml_dtypes.int4), positive(4, 2)],
        {"axis": 1, "block_size": 3},
        frozen=(0,),
        note="blocks of int4",
    ),
]


@pytest.mark.parametrize("case", QUANTIZED, ids=str)
def test_dequantized_weights(case, make):
    case.hold(make, tolerance=1e-6)
