"""Models of one node: those that the onnx package generates with inputs and outputs, and ours."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import helper
from onnx.backend.test.case.node import collect_testcases

from iobs_onnx.runtime.differentiable import Evaluator, agreement
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


@dataclass
class Case:
    """One node; inputs in order, None for one that is left out; the names of its outputs."""

    op_type: str
    inputs: list
    attributes: dict = field(default_factory=dict)
    outputs: tuple = ("y",)
    frozen: tuple = ()  # places of inputs that are initializers
    note: str = ""
    domain: str = "com.microsoft"
    compared: tuple = ()  # outputs, all float ones by default
    opset: int = 21

    def __str__(self):
        return f"{self.op_type} {self.note}".strip()

    def model(self, make):
        """Return the model, its inputs and the outputs to compare."""
        names = [f"i{place}" if x is not None else "" for place, x in enumerate(self.inputs)]
        node = helper.make_node(
            self.op_type, names, self.outputs, domain=self.domain, **self.attributes
        )
        given = {n: np.asarray(x) for n, x in zip(names, self.inputs, strict=True) if n}
        weights = {f"i{place}": given.pop(f"i{place}") for place in self.frozen}
        wanted = self.compared or [output for output in self.outputs if output]
        return make([node], given, weights, wanted, self.opset), given

    def hold(self, make, tolerance):
        """Hold the evaluation against ONNX Runtime's."""
        model, given = self.model(make)
        found = agreement(model, [given], tolerance=tolerance)
        assert found.ok, found.reason

    def differentiate(self, make, held=()):
        """Hold the gradients against differences, in float64."""
        model, given = self.model(make)
        evaluator = Evaluator(model, precision="float64")
        tensors = {name: torch.from_numpy(array.copy()) for name, array in given.items()}
        moved = {
            name: x.double().requires_grad_()
            for name, x in tensors.items()
            if x.is_floating_point() and x.numel() and name not in held
        }
        rest = {name: x for name, x in tensors.items() if name not in moved}

        def function(*arguments):
            found = evaluator({**rest, **dict(zip(moved, arguments, strict=True))})
            return tuple(y for y in found.values() if y.is_floating_point() and y.requires_grad)

        torch.autograd.gradcheck(
            function, tuple(moved.values()), fast_mode=True, atol=1e-4, rtol=1e-3
        )
