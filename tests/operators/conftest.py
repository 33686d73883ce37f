"""ONNX Runtime as the reference, and the table of cases on the path."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

sys.path.insert(0, str(Path(__file__).parent))

Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def run() -> Callable[[ir.Model | onnx.ModelProto, Arrays], Arrays]:
    """Runs a model in ONNX Runtime, without graph optimisation; outputs by name."""
    import onnxruntime as ort

    def execute(model: ir.Model | onnx.ModelProto, feeds: Arrays) -> Arrays:
        proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    return execute
