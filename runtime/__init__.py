"""Everything that runs a model in ONNX Runtime; no graph is rewritten here."""

from iobs_onnx.runtime.calibrate import Calibration, calibrate
from iobs_onnx.runtime.data import Data, open_data
from iobs_onnx.runtime.session import input_specs, open_session, session_info
from iobs_onnx.runtime.verify import OutputFidelity, compare, run_finite

__all__ = [
    "Calibration",
    "Data",
    "OutputFidelity",
    "calibrate",
    "compare",
    "input_specs",
    "open_data",
    "open_session",
    "run_finite",
    "session_info",
]
