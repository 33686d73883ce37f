"""Layer solvers: tensors in, tensors out; no ONNX, no input or output."""

from iobs_onnx.solvers.iobs import IOBS
from iobs_onnx.solvers.magnitude import Magnitude
from iobs_onnx.solvers.problem import Problem, Solver, Sparse
from iobs_onnx.solvers.sparsegpt import SparseGPT
from iobs_onnx.solvers.wanda import Wanda

SOLVERS: dict[str, type[Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "iobs": IOBS,
}

__all__ = ["IOBS", "SOLVERS", "Magnitude", "Problem", "Solver", "Sparse", "SparseGPT", "Wanda"]
