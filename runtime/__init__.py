"""Everything that runs a model in ONNX Runtime; no graph is rewritten here."""

from iobs_onnx.runtime.calibrate import Calibration, calibrate
from iobs_onnx.runtime.data import Data, default_pad_mask, open_data
from iobs_onnx.runtime.executor import Batch, Store, Stream
from iobs_onnx.runtime.feeds import Feed
from iobs_onnx.runtime.mix import with_random_tokens
from iobs_onnx.runtime.session import input_specs, open_session, session_info
from iobs_onnx.runtime.verify import Fidelity, OutputFidelity

__all__ = [
    "Batch",
    "Calibration",
    "Data",
    "Feed",
    "Fidelity",
    "OutputFidelity",
    "Store",
    "Stream",
    "calibrate",
    "default_pad_mask",
    "input_specs",
    "open_data",
    "open_session",
    "session_info",
    "with_random_tokens",
]
