"""Gradients by autograd against differences, in float64, on the cases of the onnx package."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from node_cases import cases, operator, tensor

from iobs_onnx.runtime.differentiable import Evaluator, unsupported

# Operators whose gradient is not that of their function.
SET_APART = {
    "Cast",  # to types of which differences see the steps
    "CastLike",
    "DequantizeLinear",
    "Dropout",
    "DynamicQuantizeLinear",
    "QLinearMatMul",
    "QuantizeLinear",
}
# Inputs that say how large a result is, or where it is read; and weights that torch holds fast.
HELD = {
    ("NegativeLogLikelihoodLoss", 2),
    ("OneHot", 0),
    ("OneHot", 1),
    ("Pad", 2),
    ("Range", 0),
    ("Range", 1),
    ("Range", 2),
    ("Resize", 1),
    ("Resize", 2),
    ("SoftmaxCrossEntropyLoss", 2),
    ("Upsample", 1),
}
# Cases at a place where the function has no gradient, or that show infinities.
EDGES = {
    "test_batchnorm_epsilon_training_mode": "averages of the batch, which torch gives no gradient",
    "test_batchnorm_example_training_mode": "averages of the batch, which torch gives no gradient",
    "test_col2im_5d": "is not evaluated",
    "test_attention_4d_with_past_and_present_qk_matmul_bias_3d_mask_causal": "shows −∞",
    "test_attention_4d_with_past_and_present_qk_matmul_bias_4d_mask_causal": "shows −∞",
    "test_mod_float_edge_cases_fmod_0_float32": "infinities and NaN",
    "test_mod_float_edge_cases_fmod_0_float64": "infinities and NaN",
}


def leaves(model, given):
    """Return the inputs to differentiate by, moved off the edges, and the others."""
    node = model.graph[0]
    generator = torch.Generator().manual_seed(0)
    moved, rest = {}, {}
    for value, one in zip(model.graph.inputs, given, strict=True):
        x = tensor(one)
        places = [place for place, read in enumerate(node.inputs) if read is value]
        held = any((node.op_type, place) in HELD for place in places)
        if x.dtype in (torch.float32, torch.float64) and x.numel() and not held:
            step = torch.rand(x.shape, generator=generator, dtype=torch.float64)
            moved[value.name] = (x.double() + 0.003 + 0.007 * step).requires_grad_()
        else:
            rest[value.name] = x
    return moved, rest


@cache
def differentiable():
    found = {}
    for name, (case, model) in cases().items():
        known = len(model.graph) == 1 and not unsupported(model)
        if known and model.graph[0].op_type not in SET_APART and name not in EDGES:
            found.setdefault(operator(name), []).append((name, case, model))
    return found


@pytest.mark.parametrize("group", sorted(differentiable()))
def test_gradients_are_those_of_the_function(group):
    failed = []
    for name, case, model in differentiable()[group]:
        reason = check(model, case.data_sets[0][0])
        if reason:
            failed.append(f"{name}: {reason}")
    assert not failed, "\n".join(failed)


def check(model, given):
    moved, rest = leaves(model, given)
    if not moved:
        return None
    evaluator = Evaluator(model, precision="float64")

    def function(*arguments):
        found = evaluator({**rest, **dict(zip(moved, arguments, strict=True))})
        return tuple(y for y in found.values() if y.is_floating_point())

    if not function(*moved.values()):
        return None
    try:
        torch.autograd.gradcheck(
            function, tuple(moved.values()), fast_mode=True, atol=1e-4, rtol=1e-3
        )
    except Exception as error:
        return str(error).split("\n")[0]
    return None
