"""Which function evaluates which operator."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch.nn import functional as nn

from iobs_onnx.runtime.differentiable import (
    activations,
    attention,
    contrib,
    contrib_attention,
    control,
    convolution,
    creation,
    elementwise,
    indexing,
    linear,
    losses,
    normalization,
    pad,
    pooling,
    quantization,
    recurrent,
    reduction,
    resize,
    rotary,
    sampling,
    shape,
)
from iobs_onnx.runtime.differentiable.context import Context, Operator
from iobs_onnx.runtime.differentiable.dtypes import TYPES
from iobs_onnx.runtime.differentiable.elementwise import binary, comparison, unary, variadic

# Operators whose result is another each time; there is none yet that is evaluated.
RANDOM: frozenset[tuple[str, str]] = frozenset()

_MS = "com.microsoft"

OPERATORS: dict[tuple[str, str], Operator] = {
    # Functions of one tensor
    ("", "Abs"): unary(torch.abs),
    ("", "Acos"): unary(torch.acos),
    ("", "Acosh"): unary(torch.acosh),
    ("", "Asin"): unary(torch.asin),
    ("", "Asinh"): unary(torch.asinh),
    ("", "Atan"): unary(torch.atan),
    ("", "Atanh"): unary(torch.atanh),
    ("", "BitwiseNot"): unary(torch.bitwise_not),
    ("", "Ceil"): unary(torch.ceil),
    ("", "Cos"): unary(torch.cos),
    ("", "Cosh"): unary(torch.cosh),
    ("", "Det"): unary(torch.det),
    ("", "Erf"): unary(torch.erf),
    ("", "Exp"): unary(torch.exp),
    ("", "Floor"): unary(torch.floor),
    ("", "IsNaN"): unary(torch.isnan),
    ("", "Log"): unary(torch.log),
    ("", "Neg"): unary(torch.neg),
    ("", "Not"): unary(torch.logical_not),
    ("", "Reciprocal"): unary(torch.reciprocal),
    ("", "Relu"): unary(torch.relu),
    ("", "Round"): unary(torch.round),
    ("", "Sigmoid"): unary(torch.sigmoid),
    ("", "Sign"): unary(torch.sign),
    ("", "Sin"): unary(torch.sin),
    ("", "Sinh"): unary(torch.sinh),
    ("", "Sqrt"): unary(torch.sqrt),
    ("", "Tan"): unary(torch.tan),
    ("", "Tanh"): unary(torch.tanh),
    # Arithmetic and logic that broadcast
    ("", "Add"): binary(torch.add),
    ("", "And"): binary(torch.logical_and),
    ("", "BitShift"): elementwise.shift,
    ("", "BitwiseAnd"): binary(torch.bitwise_and),
    ("", "BitwiseOr"): binary(torch.bitwise_or),
    ("", "BitwiseXor"): binary(torch.bitwise_xor),
    ("", "Clip"): elementwise.clip,
    ("", "Div"): elementwise.divide,
    ("", "Equal"): comparison(torch.eq),
    ("", "Greater"): comparison(torch.gt),
    ("", "GreaterOrEqual"): comparison(torch.ge),
    ("", "IsInf"): elementwise.is_infinite,
    ("", "Less"): comparison(torch.lt),
    ("", "LessOrEqual"): comparison(torch.le),
    ("", "Max"): variadic(torch.maximum),
    ("", "Mean"): elementwise.mean,
    ("", "Min"): variadic(torch.minimum),
    ("", "Mod"): elementwise.modulo,
    ("", "Mul"): binary(torch.mul),
    ("", "Or"): binary(torch.logical_or),
    ("", "PRelu"): elementwise.prelu,
    ("", "Pow"): elementwise.power,
    ("", "Sub"): binary(torch.sub),
    ("", "Sum"): variadic(torch.add),
    ("", "Where"): elementwise.where,
    ("", "Xor"): binary(torch.logical_xor),
    # Activations
    ("", "Celu"): activations.celu,
    ("", "Elu"): activations.elu,
    ("", "Gelu"): activations.gelu,
    ("", "HardSigmoid"): activations.hard_sigmoid,
    ("", "HardSwish"): unary(nn.hardswish),
    ("", "LeakyRelu"): activations.leaky_relu,
    ("", "Mish"): unary(nn.mish),
    ("", "Selu"): activations.selu,
    ("", "Shrink"): activations.shrink,
    ("", "Softplus"): unary(activations.softplus),
    ("", "Softsign"): unary(nn.softsign),
    ("", "SwiGLU"): activations.swiglu,
    ("", "Swish"): activations.swish,
    ("", "ThresholdedRelu"): activations.thresholded_relu,
    # Types and the like
    ("", "Cast"): elementwise.cast,
    ("", "CastLike"): elementwise.cast_like,
    ("", "Dropout"): elementwise.dropout,
    ("", "Identity"): shape.identity,
    # Making tensors
    ("", "BlackmanWindow"): creation.window,
    ("", "Constant"): creation.constant,
    ("", "ConstantOfShape"): creation.constant_of_shape,
    ("", "EyeLike"): creation.eye_like,
    ("", "HammingWindow"): creation.window,
    ("", "HannWindow"): creation.window,
    ("", "Range"): creation.range_,
    # Shapes
    ("", "CenterCropPad"): pad.center_crop_pad,
    ("", "Concat"): shape.concat,
    ("", "DepthToSpace"): shape.depth_to_space,
    ("", "Expand"): shape.expand,
    ("", "Flatten"): shape.flatten,
    ("", "Pad"): pad.pad,
    ("", "Reshape"): shape.reshape,
    ("", "ReverseSequence"): shape.reverse_sequence,
    ("", "Shape"): shape.shape,
    ("", "Size"): shape.size,
    ("", "Slice"): shape.slice_,
    ("", "SpaceToDepth"): shape.space_to_depth,
    ("", "Split"): shape.split,
    ("", "Squeeze"): shape.squeeze,
    ("", "Tile"): shape.tile,
    ("", "Transpose"): shape.transpose,
    ("", "Trilu"): shape.trilu,
    ("", "Unsqueeze"): shape.unsqueeze,
    # Indices
    ("", "Compress"): indexing.compress,
    ("", "Gather"): indexing.gather,
    ("", "GatherElements"): indexing.gather_elements,
    ("", "GatherND"): indexing.gather_nd,
    ("", "NonZero"): indexing.nonzero,
    ("", "OneHot"): indexing.one_hot,
    ("", "Scatter"): indexing.scatter_elements,
    ("", "ScatterElements"): indexing.scatter_elements,
    ("", "ScatterND"): indexing.scatter_nd,
    ("", "TensorScatter"): indexing.tensor_scatter,
    ("", "TopK"): indexing.top_k,
    ("", "Unique"): indexing.unique,
    # Reductions
    ("", "ArgMax"): reduction.argument(largest=True),
    ("", "ArgMin"): reduction.argument(largest=False),
    ("", "CumProd"): reduction.cumulative(torch.cumprod, 1.0),
    ("", "CumSum"): reduction.cumulative(torch.cumsum, 0.0),
    ("", "ReduceL1"): reduction.reduction(reduction.norm1, torch.abs),
    ("", "ReduceL2"): reduction.reduction(reduction.norm2, torch.abs),
    ("", "ReduceLogSum"): reduction.reduction(reduction.log_of_sum, torch.log),
    ("", "ReduceLogSumExp"): reduction.reduction(reduction.log_of_exponentials),
    ("", "ReduceMax"): reduction.reduction(reduction.maximum),
    ("", "ReduceMean"): reduction.reduction(reduction.mean),
    ("", "ReduceMin"): reduction.reduction(reduction.minimum),
    ("", "ReduceProd"): reduction.reduction(reduction.product),
    ("", "ReduceSum"): reduction.reduction(reduction.total),
    ("", "ReduceSumSquare"): reduction.reduction(reduction.sum_of_squares, torch.square),
    # Norms
    ("", "BatchNormalization"): normalization.batch_norm,
    ("", "GroupNormalization"): normalization.group_norm,
    ("", "Hardmax"): normalization.softmax(normalization.hardmax),
    ("", "InstanceNormalization"): normalization.instance_norm,
    ("", "LRN"): normalization.local_response_norm,
    ("", "LayerNormalization"): normalization.layer_norm,
    ("", "LogSoftmax"): normalization.softmax(torch.log_softmax),
    ("", "LpNormalization"): normalization.lp_norm,
    ("", "MeanVarianceNormalization"): normalization.mean_variance_norm,
    ("", "RMSNormalization"): normalization.rms_norm,
    ("", "SimplifiedLayerNormalization"): normalization.simplified_layer_norm,
    ("", "Softmax"): normalization.softmax(torch.softmax),
    # Products
    ("", "Conv"): convolution.conv,
    ("", "ConvInteger"): convolution.conv_integer,
    ("", "ConvTranspose"): convolution.conv_transpose,
    ("", "Einsum"): linear.einsum,
    ("", "Gemm"): linear.gemm,
    ("", "MatMul"): linear.matmul,
    # Pools
    ("", "AveragePool"): pooling.average_pool,
    ("", "GlobalAveragePool"): pooling.global_average_pool,
    ("", "GlobalLpPool"): pooling.global_lp_pool,
    ("", "GlobalMaxPool"): pooling.global_max_pool,
    ("", "LpPool"): pooling.lp_pool,
    ("", "MaxPool"): pooling.max_pool,
    ("", "MaxUnpool"): pooling.max_unpool,
    # Resizing and sampling
    ("", "AffineGrid"): sampling.affine_grid,
    ("", "Col2Im"): sampling.column_to_image,
    ("", "DFT"): sampling.fourier,
    ("", "GridSample"): sampling.grid_sample,
    ("", "Resize"): resize.resize,
    ("", "STFT"): sampling.short_time_fourier,
    ("", "Upsample"): resize.upsample,
    # Recurrent networks
    ("", "GRU"): recurrent.gru,
    ("", "LSTM"): recurrent.lstm,
    ("", "RNN"): recurrent.rnn,
    # Attention
    ("", "Attention"): attention.attention,
    ("", "RotaryEmbedding"): rotary.rotary,
    # Quantization
    ("", "DequantizeLinear"): quantization.dequantize,
    ("", "DynamicQuantizeLinear"): quantization.dynamic_quantize,
    ("", "MatMulInteger"): quantization.matmul_integer,
    ("", "QLinearConv"): quantization.qlinear_conv,
    ("", "QLinearMatMul"): quantization.qlinear_matmul,
    ("", "QuantizeLinear"): quantization.quantize,
    # Losses
    ("", "NegativeLogLikelihoodLoss"): losses.likelihood,
    ("", "SoftmaxCrossEntropyLoss"): losses.cross_entropy,
    # Control flow
    ("", "If"): control.if_,
    ("", "Loop"): control.loop,
    ("", "Scan"): control.scan,
    # ONNX Runtime's own
    (_MS, "Attention"): contrib_attention.attention,
    (_MS, "BiasAdd"): linear.bias_add,
    (_MS, "BiasGelu"): activations.bias_gelu,
    (_MS, "BiasSplitGelu"): contrib.bias_split_gelu,
    (_MS, "DequantizeLinear"): quantization.dequantize,
    (_MS, "DynamicQuantizeMatMul"): quantization.dynamic_quantize_matmul,
    (_MS, "EmbedLayerNormalization"): contrib.embed_layer_norm,
    (_MS, "ExpandDims"): contrib.expand_dims,
    (_MS, "FastGelu"): activations.fast_gelu,
    (_MS, "FusedConv"): convolution.fused_conv,
    (_MS, "FusedGemm"): linear.gemm,
    (_MS, "FusedMatMul"): linear.fused_matmul,
    (_MS, "FusedMatMulActivation"): linear.fused_matmul,
    (_MS, "GatherBlockQuantized"): quantization.gather_block_quantized,
    (_MS, "Gelu"): activations.gelu,
    (_MS, "GemmFastGelu"): linear.matmul_fast_gelu,
    (_MS, "GroupQueryAttention"): contrib_attention.group_query,
    (_MS, "MatMulIntegerToFloat"): quantization.matmul_integer_to_float,
    (_MS, "MatMulNBits"): quantization.matmul_n_bits,
    (_MS, "MultiHeadAttention"): contrib_attention.multi_head,
    (_MS, "QuantizeLinear"): quantization.quantize,
    (_MS, "QuickGelu"): activations.swish,
    (_MS, "RotaryEmbedding"): rotary.rotary_microsoft,
    (_MS, "SkipLayerNormalization"): contrib.skip_layer_norm,
    (_MS, "SkipSimplifiedLayerNormalization"): contrib.skip_simplified_layer_norm,
    (_MS, "TransposeMatMul"): linear.fused_matmul,
    (_MS, "Trilu"): shape.trilu,
}


def refusal(context: Context) -> str | None:
    """Say why a node cannot be evaluated although its operator can; None if it can."""
    declared = {kind for kind in context.types if kind is not None}
    if context.op_type in ("Cast", "Constant") and not context.domain:
        declared.add(ir.DataType(context.integer("to", ir.DataType.FLOAT)))
    lacking = sorted(kind.name for kind in declared - TYPES.keys())
    if lacking:
        return f"torch has no element type {lacking[0]}"
    if context.op_type == "Constant" and any("string" in name for name in context.attributes):
        return "torch has no strings"
    if context.op_type == "Scan" and context.version < 9:
        return "operator set 8 scans batches in another way"
    if context.domain == _MS and context.op_type == "MatMulNBits" and context.operands > 4:
        return "g_idx orders the groups of its weight" if context.present(4) else None
    return None
