"""The cases that the onnx package generates for each operator, with their own tolerances."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
import torch
from node_cases import cases, operator, tensor

from iobs_onnx.errors import ModelError
from iobs_onnx.runtime.differentiable import OPERATORS, Evaluator, unsupported

RANDOM = "drops elements at random"
FLOAT8 = "torch gives the largest float8 where ONNX wants NaN, without saturation"
ROUNDED = "zero, exactly, where the case has the rounding of its own transform"
CORNERS = "divides by the whole number of outputs where it is no multiple, as ONNX Runtime does"
EXCEPTIONS = {
    "test_resize_downsample_scales_cubic_align_corners": CORNERS,
    "test_resize_downsample_scales_linear_align_corners": CORNERS,
    "test_cast_no_saturate_FLOAT_to_FLOAT8E4M3FN": FLOAT8,
    "test_cast_no_saturate_FLOAT16_to_FLOAT8E4M3FN": FLOAT8,
    "test_castlike_no_saturate_FLOAT_to_FLOAT8E4M3FN": FLOAT8,
    "test_castlike_no_saturate_FLOAT_to_FLOAT8E4M3FN_expanded": FLOAT8,
    "test_castlike_no_saturate_FLOAT16_to_FLOAT8E4M3FN": FLOAT8,
    "test_castlike_no_saturate_FLOAT16_to_FLOAT8E4M3FN_expanded": FLOAT8,
    "test_col2im_5d": "torch folds one or two axes",
    "test_dft_inverse": ROUNDED,
    "test_dft_inverse_opset19": ROUNDED,
    "test_training_dropout": RANDOM,
    "test_training_dropout_default": RANDOM,
    "test_training_dropout_default_mask": RANDOM,
    "test_training_dropout_mask": RANDOM,
}

# Operators of the cases that are not evaluated, and why.
STRINGS, SEQUENCES = "strings", "sequences and optional values"
LATER, DRAWN, OUTSIDE = "not yet", "random", "no part of a network that is trained"
UNCOVERED = {
    ("", "Bernoulli"): DRAWN,
    ("", "BitCast"): OUTSIDE,
    ("", "CausalConvWithState"): LATER,
    ("", "DeformConv"): LATER,
    ("", "ImageDecoder"): OUTSIDE,
    ("", "LinearAttention"): LATER,
    ("", "MelWeightMatrix"): OUTSIDE,
    ("", "NonMaxSuppression"): OUTSIDE,
    ("", "Optional"): SEQUENCES,
    ("", "OptionalGetElement"): SEQUENCES,
    ("", "OptionalHasElement"): SEQUENCES,
    ("", "RandomUniformLike"): DRAWN,
    ("", "RegexFullMatch"): STRINGS,
    ("", "RoiAlign"): LATER,
    ("", "SequenceAt"): SEQUENCES,
    ("", "SequenceConstruct"): SEQUENCES,
    ("", "SequenceEmpty"): SEQUENCES,
    ("", "SequenceInsert"): SEQUENCES,
    ("", "SequenceLength"): SEQUENCES,
    ("", "SequenceMap"): SEQUENCES,
    ("", "SplitToSequence"): SEQUENCES,
    ("", "StringConcat"): STRINGS,
    ("", "StringNormalizer"): STRINGS,
    ("", "StringSplit"): STRINGS,
    ("", "TfIdfVectorizer"): OUTSIDE,
    ("ai.onnx.ml", "ArrayFeatureExtractor"): OUTSIDE,
    ("ai.onnx.ml", "Binarizer"): OUTSIDE,
    ("ai.onnx.ml", "LabelEncoder"): OUTSIDE,
    ("ai.onnx.ml", "TreeEnsemble"): OUTSIDE,
    ("ai.onnx.preview", "FlexAttention"): LATER,
    ("ai.onnx.preview.training", "Adagrad"): OUTSIDE,
    ("ai.onnx.preview.training", "Adam"): OUTSIDE,
    ("ai.onnx.preview.training", "Momentum"): OUTSIDE,
}
# Reasons that are no missing operator.
LIMITS = ("torch has no ", "operator set 8 scans batches")

# Halves may end two places apart, by other orders of sums.
PLACES = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


@cache
def reasons():
    return {name: unsupported(model) for name, (_, model) in cases().items()}


def hold(case, model):
    evaluator = Evaluator(model)
    for given, expected in case.data_sets:
        names = [value.name for value in model.graph.inputs]
        found = evaluator({n: tensor(x) for n, x in zip(names, given, strict=True)})
        for (name, y), wanted in zip(found.items(), map(tensor, expected), strict=True):
            assert (y.dtype, y.shape) == (wanted.dtype, wanted.shape), name
            wide = torch.complex128 if y.is_complex() else torch.float64
            rtol = max(case.rtol, PLACES.get(y.dtype, 0))
            np.testing.assert_allclose(y.to(wide), wanted.to(wide), rtol, case.atol, err_msg=name)


@pytest.mark.parametrize("group", sorted({operator(name) for name in cases()}))
def test_cases_of_covered_operators(group):
    failed = []
    for name, (case, model) in cases().items():
        if operator(name) == group and not reasons()[name] and name not in EXCEPTIONS:
            try:
                hold(case, model)
            except (AssertionError, ModelError) as error:
                failed.append(f"{name}: {error}")
    assert not failed, "\n".join(failed)


def test_how_many_cases_are_covered():
    covered = [name for name, found in reasons().items() if not found]
    assert len(covered) >= 1650
    assert len(covered) >= 0.85 * len(cases())


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_exceptions_are_real(name):
    assert not reasons()[name]
    with pytest.raises((AssertionError, ModelError)):
        hold(*cases()[name])


def test_what_is_not_evaluated_is_listed():
    used = {(node.domain, node.op_type) for _, model in cases().values() for node in nodes(model)}
    assert used - OPERATORS.keys() == UNCOVERED.keys()
    for name, found in reasons().items():
        limited = [reason for reason in found if any(limit in reason for limit in LIMITS)]
        lacking = {
            (node.domain, node.op_type) for node in nodes(cases()[name][1])
        } & UNCOVERED.keys()
        assert bool(found) == bool(limited or lacking), name
        assert len(found) >= len(limited), name


def nodes(model):
    copy = model.clone()
    ir.passes.common.InlinePass()(copy)
    return list(ir.traversal.RecursiveGraphIterator(copy.graph))
