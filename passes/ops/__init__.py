"""Which operators hold weights, one file an operator family."""

from __future__ import annotations

from iobs_onnx.passes.ops.conv import CONV
from iobs_onnx.passes.ops.gemm import GEMM
from iobs_onnx.passes.ops.matmul import MATMUL
from iobs_onnx.passes.ops.use import Handler, Use

__all__ = ["OP_HANDLERS", "UNSUPPORTED_OPERANDS", "Handler", "Use"]

_MS = "com.microsoft"

OP_HANDLERS: dict[tuple[str, str], Handler] = {
    ("", "MatMul"): MATMUL,
    ("", "Gemm"): GEMM,
    ("", "Conv"): CONV,
}

# Operators that multiply by a weight but have no handler yet, with the inputs that may be one:
# their constant weights are declined, so that the report never passes over them in silence.
UNSUPPORTED_OPERANDS: dict[tuple[str, str], tuple[int, ...]] = {
    ("", "ConvInteger"): (1,),
    ("", "ConvTranspose"): (1,),
    ("", "DeformConv"): (1,),
    ("", "Einsum"): (0, 1, 2, 3),
    ("", "GRU"): (1, 2),
    ("", "LSTM"): (1, 2),
    ("", "MatMulInteger"): (0, 1),
    ("", "QLinearConv"): (3,),
    ("", "QLinearMatMul"): (0, 3),
    ("", "RNN"): (1, 2),
    (_MS, "Attention"): (1,),
    (_MS, "ConvTransposeWithDynamicPads"): (1,),
    (_MS, "DynamicQuantizeLSTM"): (1, 2),
    (_MS, "DynamicQuantizeMatMul"): (1,),
    (_MS, "FusedConv"): (1,),
    (_MS, "FusedGemm"): (0, 1),
    (_MS, "FusedMatMul"): (0, 1),
    (_MS, "FusedMatMulActivation"): (0, 1),
    (_MS, "GemmFastGelu"): (1,),
    (_MS, "GemmFloat8"): (0, 1),
    (_MS, "LongformerAttention"): (1,),
    (_MS, "MatMulBnb4"): (1,),
    (_MS, "MatMulFpQ4"): (1,),
    (_MS, "MatMulInteger16"): (0, 1),
    (_MS, "MatMulIntegerToFloat"): (0, 1),
    (_MS, "MatMulNBits"): (1,),
    (_MS, "MoE"): (2, 4, 6),
    (_MS, "NhwcConv"): (1,),
    (_MS, "NhwcFusedConv"): (1,),
    (_MS, "PackedAttention"): (1,),
    (_MS, "QAttention"): (1,),
    (_MS, "QGemm"): (0, 3),
    (_MS, "QLinearConv"): (3,),
    (_MS, "QMoE"): (2, 5, 8),
    (_MS, "QOrderedAttention"): (2, 3, 4),
    (_MS, "QOrderedMatMul"): (2,),
    (_MS, "TransposeMatMul"): (0, 1),
}
