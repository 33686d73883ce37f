"""Model-local functions, unfolded to find what they multiply by and to tap what they compute."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass


def unfolded(model: ir.Model) -> ir.Model:
    """Return a copy in which calls are replaced by what they compute; tensors are shared.

    Equal models get equal names. A model with a function that onnx_ir cannot inline (one of
    another opset, or that is handed a graph) keeps all calls.
    """
    copy = model.clone()
    try:
        InlinePass()(copy)
    except ValueError:
        return model.clone()
    return copy
