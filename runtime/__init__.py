"""Everything that runs a model in ONNX Runtime; no graph is rewritten here."""

from iobs_onnx.runtime.audio import AudioSamples, read_audio_config
from iobs_onnx.runtime.calibrate import Calibration, calibrate
from iobs_onnx.runtime.data import Data, default_pad_mask, join, open_data
from iobs_onnx.runtime.executor import Batch, Store, Stream
from iobs_onnx.runtime.feeds import Feed
from iobs_onnx.runtime.images import ImageSamples
from iobs_onnx.runtime.mix import with_random_tokens
from iobs_onnx.runtime.noise import RandomSamples
from iobs_onnx.runtime.samples import Samples
from iobs_onnx.runtime.session import (
    InputSpec,
    available_providers,
    input_specs,
    open_session,
    session_info,
)
from iobs_onnx.runtime.table import TableSamples
from iobs_onnx.runtime.text import TextSamples
from iobs_onnx.runtime.verify import Fidelity, OutputFidelity
from iobs_onnx.runtime.written import SelfSamples

__all__ = [
    "AudioSamples",
    "Batch",
    "Calibration",
    "Data",
    "Feed",
    "Fidelity",
    "ImageSamples",
    "InputSpec",
    "OutputFidelity",
    "RandomSamples",
    "Samples",
    "SelfSamples",
    "Store",
    "Stream",
    "TableSamples",
    "TextSamples",
    "available_providers",
    "calibrate",
    "default_pad_mask",
    "input_specs",
    "join",
    "open_data",
    "open_session",
    "read_audio_config",
    "session_info",
    "with_random_tokens",
]
