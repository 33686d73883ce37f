"""Operators of com.microsoft, held against ONNX Runtime's kernels on the CPU."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from node_cases import Case
from onnx import helper

from iobs_onnx.runtime.differentiable import OPERATORS, Evaluator

MS = "com.microsoft"
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def integers(*values):
    return np.array(values, np.int32)


CASES = [
    Case("BiasGelu", [normal(2, 3, 8), normal(8)]),
    Case("FastGelu", [normal(2, 3, 8), normal(8)]),
    Case("FastGelu", [normal(2, 3, 8)], note="plain"),
    Case("Gelu", [normal(2, 3, 8)]),
    Case("QuickGelu", [normal(2, 3, 8)], {"alpha": 1.5}),
    Case("QuickGelu", [normal(2, 3, 8)], note="default"),
    Case("ExpandDims", [normal(2, 3), integers(1).reshape(())]),
    Case("Trilu", [normal(2, 4, 4)], {"upper": 0}),
    Case("FusedMatMul", [normal(2, 3, 4, 5), normal(2, 3, 6, 5)], {"transB": 1, "alpha": 0.5}),
    Case("FusedMatMul", [normal(2, 3, 5, 4), normal(5, 6)], {"transA": 1}, note="A"),
    Case(
        "FusedMatMul",
        [normal(4, 2, 3, 5), normal(2, 3, 5, 6)],
        {"transBatchA": 1},
        note="batch",
    ),
    Case("TransposeMatMul", [normal(2, 5, 4), normal(2, 5, 6)], {"transA": 1}),
    Case(
        "FusedGemm",
        [normal(3, 5), normal(4, 5), normal(4)],
        {"transB": 1, "activation": "LeakyRelu", "activation_alpha": 0.3},
    ),
    Case(
        "FusedConv",
        [normal(1, 4, 6, 6), normal(3, 4, 3, 3), normal(3)],
        {"activation": "Clip", "activation_params": [0.0, 1.0], "pads": [1, 0, 1, 2]},
    ),
    Case(
        "FusedConv",
        [normal(1, 4, 6, 6), normal(3, 4, 3, 3), normal(3), normal(1, 3, 4, 4)],
        {"activation": "Relu"},
        note="sum",
    ),
    Case("SkipLayerNormalization", [normal(2, 3, 8), normal(2, 3, 8), normal(8), normal(8)]),
    Case(
        "SkipLayerNormalization",
        [normal(2, 3, 8), normal(2, 3, 8), normal(8), None, normal(8)],
        {"epsilon": 1e-3},
        ("y", "", "", "sum"),
        note="bias",
    ),
    Case("SkipSimplifiedLayerNormalization", [normal(2, 3, 8), normal(2, 3, 8), normal(8)]),
    Case(
        "SkipSimplifiedLayerNormalization",
        [normal(2, 3, 8), normal(2, 3, 8), normal(8), normal(8)],
        {"epsilon": 1e-3},
        ("y", "", "", "sum"),
        note="bias",
    ),
    Case(
        "SimplifiedLayerNormalization",
        [normal(2, 3, 8), normal(8)],
        {"axis": -1, "epsilon": 1e-3, "stash_type": 1},
        domain="",
    ),
    Case(
        "EmbedLayerNormalization",
        [
            integers(*range(6)).reshape(2, 3),
            integers(0, 1, 0, 1, 1, 0).reshape(2, 3),
            *(normal(9, 8), normal(5, 8), normal(2, 8), normal(8), normal(8)),
            integers(1, 1, 1, 1, 1, 0).reshape(2, 3),
        ],
        {"epsilon": 1e-6},
        ("y", "counts", "sum"),
    ),
    Case(
        "EmbedLayerNormalization",
        [
            integers(*range(6)).reshape(2, 3),
            *(None, normal(9, 8), normal(5, 8), None, normal(8), normal(8)),
        ],
        {},
        ("y", "counts"),
        note="no segments",
    ),
    Case(
        "DynamicQuantizeMatMul",
        [
            normal(2, 3, 8),
            RNG.integers(-128, 128, (8, 5)).astype(np.int8),
            np.float32([0.02]),
            np.int8([3]),
            normal(5),
        ],
        frozen=(1, 3),
    ),
    Case(
        "MatMulIntegerToFloat",
        [
            RNG.integers(0, 256, (3, 8)).astype(np.uint8),
            RNG.integers(-128, 128, (8, 5)).astype(np.int8),
            *(np.float32(0.1), RNG.random(5).astype(np.float32)),
            *(np.uint8(120), RNG.integers(-5, 5, 5).astype(np.int8)),
        ],
        frozen=(1,),
    ),
]


def packed(bits, k=50, n=7, block=16):
    blocks = -(-k // block)
    return [
        normal(2, 3, k),
        RNG.integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8),
        RNG.random(n * blocks).astype(np.float32),
        RNG.integers(0, 256, n * -(-blocks * bits // 8)).astype(np.uint8),
    ]


for bits in (4, 8):
    sizes = {"K": 50, "N": 7, "bits": bits, "block_size": 16}
    CASES += [
        Case("MatMulNBits", packed(bits)[:3], sizes, frozen=(1, 2), note=f"{bits} symmetric"),
        Case("MatMulNBits", packed(bits), sizes, frozen=(1, 2, 3), note=f"{bits} zeros"),
        Case(
            "MatMulNBits",
            [*packed(bits), None, normal(7)],
            sizes,
            frozen=(1, 2, 3),
            note=f"{bits} bias",
        ),
    ]


def looked_up(kind, rows, columns, block, zeros=False, bits=4, across=1):
    """Return a table of `rows × columns` numbers in blocks along an axis, and indices into it."""
    shape, count = [rows, columns], (rows, columns)[1 - across]
    shape[across] = -(-shape[across] // block)
    packing = 8 // bits if kind is np.uint8 else 1
    low, high = (-8, 8) if kind is ml_dtypes.int4 else (0, 256 if kind is np.uint8 else 16)

    def whole(height, width):
        return RNG.integers(low, high, (height, -(-width // packing))).astype(kind)

    centres = [whole(*shape)] if zeros else []
    return [
        whole(rows, columns),
        RNG.integers(-count, count, (2, 3)),
        RNG.random(shape).astype(np.float32),
        *centres,
    ]


for kind, bits, zeros in (
    (np.uint8, 4, False),
    (np.uint8, 4, True),
    (np.uint8, 8, False),
    (np.uint8, 8, True),
    (ml_dtypes.int4, 4, False),
    (ml_dtypes.int4, 4, True),
    (ml_dtypes.uint4, 4, False),
    (ml_dtypes.uint4, 4, True),
):
    CASES.append(
        Case(
            "GatherBlockQuantized",
            looked_up(kind, 10, 80, 32, zeros, bits),
            {"bits": bits, "block_size": 32},
            frozen=(0, 2, *((3,) if zeros else ())),
            note=f"{kind.__name__} {bits} {'zeros' if zeros else 'symmetric'}",
        )
    )
CASES.append(
    Case(
        "GatherBlockQuantized",
        looked_up(ml_dtypes.int4, 40, 10, 16, zeros=True, across=0),
        {"block_size": 16, "gather_axis": 1, "quantize_axis": 0},
        frozen=(0, 2, 3),
        note="across",
    )
)

CACHE = [normal(32, 4), normal(32, 4)]
POSITIONS = np.array([[3, 4, 5], [0, 1, 2]])
CASES += [
    Case("RotaryEmbedding", [normal(2, 4, 3, 8), POSITIONS, *CACHE]),
    Case("RotaryEmbedding", [normal(2, 3, 32), POSITIONS, *CACHE], {"interleaved": 1}, note="3D"),
    Case("RotaryEmbedding", [normal(2, 3, 32), np.array([5]), *CACHE], note="offset"),
    Case(
        "RotaryEmbedding",
        [normal(2, 3, 40), POSITIONS, *CACHE],
        {"num_heads": 2, "rotary_embedding_dim": 8},
        note="partial",
    ),
]

X, W, B = normal(2, 5, 12), normal(12, 24), normal(24)
EIGHT = {"num_heads": 2}
CASES += [
    Case("Attention", [X, W, B], EIGHT),
    Case("Attention", [X, W, B, integers(5, 3)], EIGHT, note="lengths"),
    Case("Attention", [X, W, B, integers(5, 4, 0, 1)], EIGHT, note="ends and starts"),
    Case("Attention", [X, W, B, integers(*[1] * 8, 0, 0).reshape(2, 5)], EIGHT, note="mask"),
    Case(
        "Attention",
        [X, W, B, RNG.integers(0, 2, (2, 5, 5)).astype(np.int32)],
        {"num_heads": 2, "mask_filter_value": -50.0},
        note="3-D mask",
    ),
    Case("Attention", [X, W, B], {"num_heads": 2, "unidirectional": 1}, note="causal"),
    Case("Attention", [X, W, B], {"num_heads": 2, "scale": 0.3}, note="scale"),
    Case(
        "Attention",
        [X, W, B, None, normal(2, 2, 2, 3, 4)],
        {"num_heads": 2, "unidirectional": 1},
        ("y", "present"),
        note="past",
    ),
    Case(
        "Attention",
        [X, W, B, None, None, normal(2, 2, 5, 5)],
        EIGHT,
        note="bias of scores",
    ),
    Case(
        "Attention",
        [X, normal(12, 28), normal(28)],
        {"num_heads": 2, "qkv_hidden_sizes": [8, 8, 12]},
        note="widths",
    ),
]

Q, K, V = normal(2, 3, 16), normal(2, 5, 16), normal(2, 5, 24)
CASES += [
    Case("MultiHeadAttention", [Q, K, V], EIGHT),
    Case("MultiHeadAttention", [Q, K, V, normal(56)], EIGHT, note="bias"),
    Case(
        "MultiHeadAttention",
        [Q, K, V, None, integers(1, 1, 1, 1, 0, 1, 1, 1, 0, 0).reshape(2, 5)],
        EIGHT,
        note="mask",
    ),
    Case("MultiHeadAttention", [Q, K, V, None, integers(5, 3)], EIGHT, note="lengths"),
    Case(
        "MultiHeadAttention",
        [Q, K, V, None, None, normal(1, 2, 3, 5)],
        {"num_heads": 2, "scale": 0.2},
        note="bias of scores",
    ),
    Case(
        "MultiHeadAttention",
        [Q, normal(2, 2, 5, 8), normal(2, 2, 5, 8)],
        EIGHT,
        note="heads first",
    ),
    Case(
        "MultiHeadAttention",
        [
            Q,
            normal(2, 3, 16),
            normal(2, 3, 16),
            *[None] * 3,
            normal(2, 2, 4, 8),
            normal(2, 2, 4, 8),
        ],
        {"num_heads": 2, "unidirectional": 1},
        ("y", "present_k", "present_v"),
        note="past",
    ),
]


def grouped(length, past, lengths, note, packed=False, extra=(), compared=(), **attributes):
    """A case of GroupQueryAttention: 4 heads of 16 in 2 groups, a sample for each length."""
    batch = len(lengths)
    heads = {"num_heads": 4, "kv_num_heads": 2, **attributes}
    if packed:
        parts = [normal(batch, length, 128), None, None]
    else:
        parts = [normal(batch, length, 64), normal(batch, length, 32), normal(batch, length, 32)]
    cache = [normal(batch, 2, past, 16), normal(batch, 2, past, 16)]
    ends = integers(*(n - 1 for n in lengths))
    rotary = [normal(32, 8), normal(32, 8)] if attributes.get("do_rotary") else [None, None]
    inputs = [*parts, *cache, ends, integers(max(lengths)).reshape(()), *rotary, *extra]
    outputs = ("y", "present_k", "present_v")
    return Case("GroupQueryAttention", inputs, heads, outputs, (6,), note, MS, compared)


CASES += [
    grouped(6, 0, (6, 6), "prompt"),
    grouped(6, 0, (6, 6), "prompt rotary", do_rotary=1),
    grouped(6, 0, (6, 6), "prompt interleaved", do_rotary=1, rotary_interleaved=1),
    grouped(6, 0, (6, 6), "prompt packed", packed=True, do_rotary=1),
    grouped(1, 7, (8, 8), "token", do_rotary=1),
    grouped(1, 7, (8, 8), "token window", do_rotary=1, local_window_size=3),
    grouped(6, 0, (6, 6), "prompt window", local_window_size=2),
    grouped(6, 0, (6, 6), "softcap", softcap=2.0, scale=0.7),
    grouped(6, 0, (6, 6), "smooth", smooth_softmax=1),
    grouped(3, 5, (8,), "chunk", do_rotary=1),
    # What lies in the caches behind a sample's own length is nobody's.
    grouped(1, 7, (8, 5), "ragged token", do_rotary=1, compared=("y",)),
    grouped(6, 0, (6, 6), "bias", extra=(None, normal(1, 4, 6, 6))),
    grouped(6, 0, (6, 6), "sink", extra=(None, None, normal(4))),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_onnx_runtime(case, make):
    case.hold(make, tolerance=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_function(case, make):
    if case.op_type not in ("DynamicQuantizeMatMul", "GatherBlockQuantized"):  # round, have none
        case.differentiate(make)


def test_packed_heads_are_those_apart(make):
    q, k, v = normal(2, 3, 2, 8), normal(2, 3, 2, 8), normal(2, 3, 2, 8)
    flat = {name: array.reshape(2, 3, 16) for name, array in (("q", q), ("k", k), ("v", v))}
    packings = [
        flat,
        {"q": flat["q"], "k": np.stack([k, v], 3)},
        {"q": np.stack([q, k, v], 3)},
    ]
    found = []
    for inputs in packings:
        node = helper.make_node("MultiHeadAttention", [*inputs], ["y"], domain=MS, num_heads=2)
        evaluator = Evaluator(make([node], inputs))
        given = {name: torch.from_numpy(array) for name, array in inputs.items()}
        found.append(evaluator(given)["y"])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# ONNX Runtime's CPU provider has no kernel for these; they are compositions of tested functions.
WITHOUT_KERNEL = {
    "BiasAdd": "CUDA only",
    "BiasSplitGelu": "CUDA only",
    "DequantizeLinear": "the function of ai.onnx, which its node cases hold",
    "FusedMatMulActivation": "DirectML only",
    "GemmFastGelu": "ROCm only",
    "QuantizeLinear": "the function of ai.onnx, which its node cases hold",
}


def test_every_operator_has_a_case():
    covered = {case.op_type for case in CASES if case.domain == MS}
    listed = {op_type for domain, op_type in OPERATORS if domain == MS}
    assert listed == covered | WITHOUT_KERNEL.keys()
