"""Graph in, graph out: what reads and edits ONNX models, without running or solving anything."""

from iobs_onnx.passes.check import Violation, achieved_sparsity, check_model, check_pattern
from iobs_onnx.passes.deploy import eligibility_2_4
from iobs_onnx.passes.files import load_model, model_hash, require_output, save_model
from iobs_onnx.passes.find_sites import find_sites
from iobs_onnx.passes.instrument import instrument
from iobs_onnx.passes.rewrite import rewrite
from iobs_onnx.passes.tensors import Slot, stored_slots

__all__ = [
    "Slot",
    "Violation",
    "achieved_sparsity",
    "check_model",
    "check_pattern",
    "eligibility_2_4",
    "find_sites",
    "instrument",
    "load_model",
    "model_hash",
    "require_output",
    "rewrite",
    "save_model",
    "stored_slots",
]
