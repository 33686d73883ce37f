"""The node tests that the onnx package generates: small models with inputs and outputs."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
from onnx.backend.test.case.node import collect_testcases

from iobs_onnx.runtime.differentiable.dtypes import constant


@cache
def cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, where cases divide by zero
        found = collect_testcases(None)
    return {case.name: (case, ir.from_proto(case.model)) for case in found}


def tensor(value):
    proto = isinstance(value, onnx.TensorProto)
    return constant(ir.from_proto(value) if proto else ir.tensor(np.asarray(value)), "own")


def operator(case_name):
    return case_name.removeprefix("test_").split("_")[0]
