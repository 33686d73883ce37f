"""im2col against ONNX Runtime's own convolution: weight times patches is the Conv's output."""

import sys

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from iobs_onnx.errors import ModelError
from iobs_onnx.runtime.rows import read_rows
from iobs_onnx.runtime.session import open_session
from iobs_onnx.site import (
    Patches,
    PreviousStates,
    Rows,
    Stacked,
    Tap,
    TransposedPatches,
)

CASES = {
    "1-D": ((9,), {"kernel": (3,)}),
    "1-D even kernel": ((10,), {"kernel": (4,), "pads": (2, 1)}),
    "2-D": ((7, 8), {"kernel": (3, 3)}),
    "1x1": ((5, 4), {"kernel": (1, 1)}),
    "pads": ((6, 5), {"kernel": (3, 2), "pads": (1, 0, 2, 1)}),
    "strides": ((9, 8), {"kernel": (3, 3), "strides": (2, 3), "pads": (1, 1, 1, 1)}),
    "dilations": ((11, 10), {"kernel": (3, 2), "dilations": (2, 3)}),
    "groups": ((6, 6), {"kernel": (3, 3), "groups": 3}),
    "same upper": ((7, 6), {"kernel": (3, 4), "strides": (2, 2), "auto_pad": "SAME_UPPER"}),
    "same lower": ((7, 6), {"kernel": (4, 3), "strides": (2, 1), "auto_pad": "SAME_LOWER"}),
    "same, stride over kernel": (
        (9, 9),
        {"kernel": (1, 2), "strides": (3, 3), "auto_pad": "SAME_UPPER"},
    ),
    "valid": ((7, 7), {"kernel": (3, 3), "strides": (2, 2), "auto_pad": "VALID"}),
    "3-D": ((5, 6, 4), {"kernel": (2, 3, 2), "pads": (1, 0, 1, 0, 1, 0)}),
    "all at once": (
        (8, 9, 7),
        {
            "kernel": (2, 3, 2),
            "strides": (2, 1, 2),
            "dilations": (2, 2, 1),
            "pads": (1, 2, 0, 0, 1, 1),
            "groups": 2,
        },
    ),
}


def make(space, kernel, channels=4, **given):
    rank = len(kernel)
    form = Patches(
        kernel,
        given.get("strides", (1,) * rank),
        given.get("dilations", (1,) * rank),
        given.get("pads", (0,) * (2 * rank)),
        given.get("auto_pad", "NOTSET"),
        given.get("groups", 1),
    )
    return form, Tap("x", form, channels * int(np.prod(kernel)))


def convolve(build, form, weight, x):
    attributes = {
        "kernel_shape": form.kernel,
        "strides": form.strides,
        "group": form.groups,
        "auto_pad": form.auto_pad,
    }
    if form.auto_pad == "NOTSET":
        attributes["pads"] = form.pads
    if max(form.dilations) > 1:
        attributes["dilations"] = form.dilations
    shape = [None] * x.ndim
    model = build(
        [helper.make_node("Conv", ["x", "w"], ["y"], **attributes)],
        {"x": (TensorProto.FLOAT, shape)},
        {"y": (TensorProto.FLOAT, shape)},
        {"w": weight},
    )
    (y,) = open_session(model, "cpu").run(None, {"x": x})
    return y


@pytest.mark.parametrize("chunk_bytes", [64 << 20, 3000, 1])
@pytest.mark.parametrize("case", CASES)
def test_weight_times_patches_is_the_convolution(build, monkeypatch, case, chunk_bytes):
    monkeypatch.setattr(sys.modules["iobs_onnx.runtime.rows"], "_CHUNK_BYTES", chunk_bytes)
    space, given = CASES[case]
    form, tap = make(space, **given)
    channels = tap.features // int(np.prod(form.kernel))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, form.groups * channels, *space)).astype(np.float32)
    weight = rng.standard_normal((form.groups * 5, channels, *form.kernel)).astype(np.float32)
    chunks = list(read_rows(torch.from_numpy(x), tap, None))
    if chunk_bytes == 1:
        assert len(chunks) > 3, "an image larger than a chunk is split too"
    patches = torch.cat(chunks, dim=1).numpy()
    # (out, channels, *kernel) -> (groups, out, kernel positions, channels): channels last
    matrix = np.moveaxis(weight, 1, -1).reshape(form.groups, 5, tap.features)
    y = convolve(build, form, weight, x)
    # (batch, groups, out, *space) -> (groups, batch, *space, out)
    expected = np.moveaxis(y.reshape(3, form.groups, 5, *y.shape[2:]), (1, 2), (0, -1))
    found = np.einsum("gnf,gof->gno", patches, matrix)
    if chunk_bytes == 64 << 20:
        np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=1e-4, atol=1e-4)
    else:  # other chunks, other order of rows
        np.testing.assert_allclose(
            np.sort(found, axis=1), np.sort(expected.reshape(found.shape), axis=1), atol=1e-4
        )


TRANSPOSED = {
    "1-D": ((5,), (3,), {}),
    "strides": ((5, 4), (3, 2), {"strides": (2, 3)}),
    "stride over kernel": ((4,), (2,), {"strides": (4,)}),
    "pads": ((6, 5), (3, 4), {"pads": (1, 0, 2, 1), "strides": (2, 1)}),
    "pads over kernel": ((6,), (2,), {"pads": (2, 3), "strides": (3,)}),
    "output padding": ((5,), (3,), {"strides": (3,), "output_padding": (2,)}),
    "dilations": ((5, 6), (3, 2), {"dilations": (2, 3), "strides": (2, 1)}),
    "groups": ((5, 4), (2, 2), {"groups": 3, "strides": (2, 2)}),
    "output shape": ((5,), (4,), {"strides": (3,), "output_shape": (14,)}),
    "output shape, same upper": (
        (5,),
        (4,),
        {"strides": (3,), "output_shape": (15,), "auto_pad": "SAME_UPPER"},
    ),
    "same upper": ((5, 4), (4, 3), {"strides": (3, 2), "auto_pad": "SAME_UPPER"}),
    "same lower": ((5, 4), (4, 3), {"strides": (3, 2), "auto_pad": "SAME_LOWER"}),
    "valid": ((5,), (3,), {"strides": (2,), "auto_pad": "VALID"}),
    "3-D": ((3, 4, 2), (2, 1, 3), {"strides": (1, 2, 2), "pads": (1, 0, 0, 0, 0, 1)}),
}


@pytest.mark.parametrize("case", TRANSPOSED)
def test_weight_times_patches_is_the_transposed_convolution(build, case):
    space, kernel, given = TRANSPOSED[case]
    rank, channels, outputs = len(kernel), 4, 5
    form = TransposedPatches(
        kernel,
        given.get("strides", (1,) * rank),
        given.get("dilations", (1,) * rank),
        given.get("pads", (0,) * (2 * rank)),
        given.get("output_padding", (0,) * rank),
        given.get("output_shape", ()),
        given.get("auto_pad", "NOTSET"),
        given.get("groups", 1),
    )
    tap = Tap("x", form, channels * int(np.prod(kernel)))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, form.groups * channels, *space)).astype(np.float32)
    weight = rng.standard_normal((form.groups * channels, outputs, *kernel)).astype(np.float32)
    attributes = {"group" if name == "groups" else name: value for name, value in given.items()}
    model = build(
        [helper.make_node("ConvTranspose", ["x", "w"], ["y"], **attributes)],
        {"x": (TensorProto.FLOAT, [None] * x.ndim)},
        {"y": (TensorProto.FLOAT, [None] * x.ndim)},
        {"w": weight},
    )
    (y,) = open_session(model, "cpu").run(None, {"x": x})
    patches = torch.cat(list(read_rows(torch.from_numpy(x), tap, None)), dim=1).numpy()
    # (groups * channels, out, *kernel) -> (groups, out, kernel positions, channels)
    parts = weight.reshape(form.groups, channels, outputs, *kernel)
    matrix = np.moveaxis(parts, 1, -1).reshape(form.groups, outputs, tap.features)
    found = np.einsum("gnf,gof->gno", patches, matrix)
    expected = np.moveaxis(y.reshape(3, form.groups, outputs, *y.shape[2:]), (1, 2), (0, -1))
    np.testing.assert_allclose(found, expected.reshape(found.shape), atol=1e-4)


def test_channels_last():
    x = torch.randn(2, 5, 6, 4, generator=torch.Generator().manual_seed(0))
    first = Patches((3, 2), (2, 1), (1, 1), (1, 0, 0, 1))
    last = Patches((3, 2), (2, 1), (1, 1), (1, 0, 0, 1), channels_last=True)
    expected = list(read_rows(x.movedim(-1, 1), Tap("x", first, 24), None))
    found = list(read_rows(x, Tap("x", last, 24), None))
    torch.testing.assert_close(torch.cat(found, 1), torch.cat(expected, 1), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "form", "order"),
    [
        ((2, 3, 5, 4), Stacked((-1,), (-3,), (3,)), "bgti->gbti"),
        ((3, 4, 5), Stacked((-2,), (-3,), (3,)), "git->gti"),
        ((2, 5, 3, 4), Stacked((2, 3)), "btij->btij"),
        ((2, 5, 3, 4), Stacked((-1, -2)), "btij->btji"),
        ((2, 3, 5, 4), Stacked((-1,), (-4, -3), (2, 3)), "ghti->ghti"),
        ((3, 2, 5, 4), Stacked((-1,), (-3, -4), (2, 3)), "hgti->ghti"),
    ],
)
def test_stacked_rows(shape, form, order):
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    features = int(np.prod([shape[axis] for axis in form.features]))
    tap = Tap("x", form, features)
    (rows,) = read_rows(torch.from_numpy(x), tap, None)
    expected = np.einsum(order, x).reshape(tap.groups, -1, features)
    np.testing.assert_array_equal(rows.numpy(), expected)


@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4), (2, 1, 5, 4)])
def test_every_matrix_meets_an_activation_without_its_axis(shape):
    x = torch.arange(float(np.prod(shape))).reshape(shape)
    (rows,) = read_rows(x, Tap("x", Stacked((-1,), (-3,), (3,)), 4), None)
    assert rows.shape[0] == 3
    for matrix in rows:
        np.testing.assert_array_equal(matrix, x.reshape(-1, 4))


@pytest.mark.parametrize("batch_first", [False, True])
def test_previous_states(batch_first):
    y = torch.randn(4, 2, 3, 5, generator=torch.Generator().manual_seed(0))  # time first
    form = PreviousStates((False, True), batch_first)
    given = y.permute(2, 0, 1, 3) if batch_first else y
    (rows,) = read_rows(given, Tap("y", form, 5), None)
    for batch in range(3):
        for time in range(4):
            row = time * 3 + batch
            before = y[time - 1, 0, batch] if time else torch.zeros(5)
            after = y[time + 1, 1, batch] if time < 3 else torch.zeros(5)
            assert rows[0, row].tolist() == before.tolist()
            assert rows[1, row].tolist() == after.tolist()


@pytest.mark.parametrize("axis", [-1, -2, 0, 1, 2])
def test_rows_along_any_axis(axis):
    x = np.random.default_rng(1).standard_normal((2, 3, 4)).astype(np.float32)
    features = x.shape[axis]
    (rows,) = read_rows(torch.from_numpy(x), Tap("x", Rows(axis), features), None)
    expected = np.moveaxis(x, axis, -1).reshape(1, -1, features)
    np.testing.assert_array_equal(rows.numpy(), expected)


def test_masked_rows():
    x = torch.arange(24.0).reshape(2, 3, 4)
    keep = torch.tensor([[True, False, True], [False, False, True]])
    for axis in (-1, 2):
        (rows,) = read_rows(x, Tap("x", Rows(axis), 4), keep)
        assert rows[0, :, 0].tolist() == [0.0, 8.0, 20.0]


def test_float16_becomes_float32():
    (rows,) = read_rows(torch.ones(2, 3, dtype=torch.float16), Tap("x", Rows(), 3), None)
    assert rows.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "tap", "message"),
    [
        ((2, 5), Tap("h", Rows(-1), 4), r"'h' has shape \(2, 5\).* 4 features along axis -1"),
        ((5,), Tap("h", Rows(-2), 5), r"'h' has shape \(5,\).* 5 features along axis -2"),
        ((2, 5, 8), make((8,), (3,))[1], r"'x' has shape \(2, 5, 8\).* 4 channels and 1 spatial"),
        ((2, 4, 8, 8), make((8,), (3,))[1], r"'x' .* 4 channels and 1 spatial axes"),
        ((2, 4, 2), make((2,), (3,))[1], r"'x' .* smaller than the kernel \(3,\)"),
        ((2, 5, 4), Tap("h", Stacked((-1,), (-3,), (3,)), 4), r"4 features .* \(3,\) matrices"),
        ((5,), Tap("h", Stacked((-2, -1)), 4), r"4 features along axes \(-2, -1\)"),
        ((2, 5, 4), Tap("h", PreviousStates((False,)), 4), r"states of 4 features in 1 direc"),
        ((2, 1, 5, 3), Tap("h", PreviousStates((False,)), 4), r"states of 4 features in 1 direc"),
        (
            (2, 3, 8),
            Tap("h", TransposedPatches((3,), (1,), (1,), (0, 0), (0,)), 12),
            r"4 channels and 1 spatial axes",
        ),
    ],
)
def test_activation_of_another_shape(shape, tap, message):
    with pytest.raises(ModelError, match=message):
        list(read_rows(torch.zeros(shape), tap, None))
