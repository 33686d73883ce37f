"""Which operators hold weights, one file an operator family."""

from __future__ import annotations

import onnx_ir as ir

from iobs_onnx.passes.ops.attention import ATTENTION
from iobs_onnx.passes.ops.conv import CONV, FUSED_CONV
from iobs_onnx.passes.ops.conv_transpose import CONV_TRANSPOSE
from iobs_onnx.passes.ops.einsum import EINSUM
from iobs_onnx.passes.ops.gemm import FUSED_GEMM, GEMM
from iobs_onnx.passes.ops.matmul import FUSED_MATMUL, GEMM_FAST_GELU, MATMUL
from iobs_onnx.passes.ops.matmul_nbits import MATMUL_NBITS
from iobs_onnx.passes.ops.recurrent import RECURRENT
from iobs_onnx.passes.ops.use import Handler, Product, Unsupported, Use

__all__ = [
    "OP_HANDLERS",
    "UNSUPPORTED",
    "Product",
    "Use",
    "handler_of",
    "no_kernel_2_4",
    "product_of",
    "unsupported",
    "weight_operands",
]

_MS = "com.microsoft"

OP_HANDLERS: dict[tuple[str, str], Handler] = {
    ("", "MatMul"): MATMUL,
    (_MS, "FusedMatMul"): FUSED_MATMUL,
    (_MS, "FusedMatMulActivation"): FUSED_MATMUL,
    (_MS, "TransposeMatMul"): FUSED_MATMUL,
    (_MS, "GemmFastGelu"): GEMM_FAST_GELU,
    (_MS, "MatMulNBits"): MATMUL_NBITS,
    ("", "Gemm"): GEMM,
    (_MS, "FusedGemm"): FUSED_GEMM,
    ("", "Conv"): CONV,
    (_MS, "FusedConv"): FUSED_CONV,
    (_MS, "NhwcFusedConv"): FUSED_CONV,
    ("", "ConvTranspose"): CONV_TRANSPOSE,
    ("", "Einsum"): EINSUM,
    ("", "LSTM"): RECURRENT,
    ("", "GRU"): RECURRENT,
    ("", "RNN"): RECURRENT,
    (_MS, "Attention"): ATTENTION,
    (_MS, "PackedAttention"): ATTENTION,
}

_INTEGER = "multiplies integers: prune the model before it is quantized"
_PACKED = "packs its weight in blocks: prune the model before it is quantized"

# Operators that multiply by a weight but have no handler: their constant weights are declined, so
# that the report never passes over them in silence.
UNSUPPORTED: dict[tuple[str, str], Unsupported] = {
    ("", "ConvInteger"): Unsupported((1,), _INTEGER),
    ("", "DeformConv"): Unsupported((1,), "samples its input where another input says"),
    ("", "MatMulInteger"): Unsupported((0, 1), _INTEGER),
    ("", "QLinearConv"): Unsupported((3,), _INTEGER),
    ("", "QLinearMatMul"): Unsupported((0, 3), _INTEGER),
    (_MS, "ConvTransposeWithDynamicPads"): Unsupported((1,), "reads its pads from an input"),
    (_MS, "DynamicQuantizeLSTM"): Unsupported((1, 2), _INTEGER),
    (_MS, "DynamicQuantizeMatMul"): Unsupported((1,), _INTEGER),
    (_MS, "GemmFloat8"): Unsupported((0, 1), "multiplies float8 with scales of its own"),
    (_MS, "LongformerAttention"): Unsupported((1, 4), "projects its global tokens apart"),
    (_MS, "MatMulBnb4"): Unsupported((1,), _PACKED),
    (_MS, "MatMulFpQ4"): Unsupported((1,), _PACKED),
    (_MS, "MatMulInteger16"): Unsupported((0, 1), _INTEGER),
    (_MS, "MatMulIntegerToFloat"): Unsupported((0, 1), _INTEGER),
    (_MS, "MoE"): Unsupported((2, 4, 6), "routes tokens to its experts where no tap can read them"),
    (_MS, "NhwcConv"): Unsupported((1,), "lays out its weight as its execution provider likes"),
    (_MS, "QAttention"): Unsupported((1,), _INTEGER),
    (_MS, "QGemm"): Unsupported((0, 3), _INTEGER),
    (_MS, "QLinearConv"): Unsupported((3,), _INTEGER),
    (_MS, "QMoE"): Unsupported((2, 5, 8), _PACKED),
    (_MS, "QOrderedAttention"): Unsupported((2, 3, 4), _INTEGER),
    (_MS, "QOrderedMatMul"): Unsupported((2,), _INTEGER),
}


def handler_of(node: ir.Node) -> Handler | None:
    """Return what is known of a node's operator; None for those without weights."""
    return OP_HANDLERS.get((node.domain, node.op_type))


def product_of(node: ir.Node, rank: int) -> Product | None:
    """Return a node as a plain product with a weight of this rank; None where it is not one."""
    handler = handler_of(node)
    if handler is None or handler.product is None:
        return None
    return handler.product(node, rank)


def no_kernel_2_4(op_type: str) -> str:
    """Say why no known engine has 2:4 kernels for weights of an operator; empty where one may.

    Args:
        op_type: without its domain, as in `Site.op_type`.
    """
    found = (handler.no_kernel for (_, name), handler in OP_HANDLERS.items() if name == op_type)
    return next(filter(None, found), "").format(op_type=op_type)


def weight_operands(node: ir.Node) -> tuple[int, ...]:
    """Return the inputs of a node that may be a weight."""
    key = (node.domain, node.op_type)
    known = OP_HANDLERS.get(key) or UNSUPPORTED.get(key)
    return known.operands if known else ()


def unsupported(node: ir.Node) -> str | None:
    """Say why a node that multiplies by weights has no handler; None for other nodes."""
    known = UNSUPPORTED.get((node.domain, node.op_type))
    return f"{node.op_type} is not supported: it {known.reason}" if known else None
