"""Element types and constants of ONNX as torch has them."""

from __future__ import annotations

import warnings
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from iobs_onnx.errors import ModelError

Precision: TypeAlias = Literal["own", "float32", "float64"]

_D = ir.DataType

# Integers of four and two bits are held in a byte each.
TYPES: dict[ir.DataType, torch.dtype] = {
    _D.FLOAT: torch.float32,
    _D.DOUBLE: torch.float64,
    _D.FLOAT16: torch.float16,
    _D.BFLOAT16: torch.bfloat16,
    _D.BOOL: torch.bool,
    _D.INT8: torch.int8,
    _D.INT16: torch.int16,
    _D.INT32: torch.int32,
    _D.INT64: torch.int64,
    _D.UINT8: torch.uint8,
    _D.UINT16: torch.uint16,
    _D.UINT32: torch.uint32,
    _D.UINT64: torch.uint64,
    _D.INT4: torch.int8,
    _D.UINT4: torch.uint8,
    _D.COMPLEX64: torch.complex64,
    _D.COMPLEX128: torch.complex128,
    _D.FLOAT8E4M3FN: torch.float8_e4m3fn,
    _D.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    _D.FLOAT8E5M2: torch.float8_e5m2,
    _D.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}
_HALVES = (torch.float16, torch.bfloat16)
# Types of which NumPy has no name that torch knows: read as bits.
_BITS = {torch.bfloat16: np.int16} | {
    TYPES[kind]: np.uint8
    for kind in (_D.FLOAT8E4M3FN, _D.FLOAT8E4M3FNUZ, _D.FLOAT8E5M2, _D.FLOAT8E5M2FNUZ)
}


def evaluated(dtype: torch.dtype, precision: Precision) -> torch.dtype:
    """Return the type in which values of `dtype` are computed."""
    if precision == "float64" and (dtype in _HALVES or dtype == torch.float32):
        return torch.float64
    if precision == "float32" and dtype in _HALVES:
        return torch.float32
    return dtype


def torch_type(code: int, precision: Precision) -> torch.dtype:
    """Return the type in which values of ONNX's element type `code` are computed.

    Raises:
        ModelError: torch has no such type.
    """
    kind = ir.DataType(code)
    if kind not in TYPES:
        raise ModelError(f"torch has no element type {kind.name}")
    return evaluated(TYPES[kind], precision)


def constant(tensor: ir.TensorProtocol, precision: Precision) -> Tensor:
    """Return a constant of the model as torch reads it; without a copy where its type stays.

    Raises:
        ModelError: torch has no such element type.
    """
    dtype = torch_type(tensor.dtype, "own")
    array = tensor.numpy()
    if tensor.dtype in (_D.INT4, _D.UINT4):
        array = array.astype(np.int8 if tensor.dtype == _D.INT4 else np.uint8)
    if dtype in _BITS:
        array = array.view(_BITS[dtype])
    with warnings.catch_warnings():
        # Constants are never written to, so it does no harm that torch could.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        value = torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    return value.view(dtype).to(evaluated(dtype, precision))
