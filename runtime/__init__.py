"""Everything that runs a model in ONNX Runtime; no graph is rewritten here."""

from iobs_onnx.runtime.calibrate import Calibration, NotFinite, Sums, calibrate, collect
from iobs_onnx.runtime.data.audio import AudioSamples, read_audio_config
from iobs_onnx.runtime.data.feeds import Feed
from iobs_onnx.runtime.data.images import ImageSamples
from iobs_onnx.runtime.data.named import NoCallable, find_callable
from iobs_onnx.runtime.data.open import Data, join, open_data
from iobs_onnx.runtime.data.random_numbers import RandomSamples
from iobs_onnx.runtime.data.random_tokens import with_random_tokens
from iobs_onnx.runtime.data.samples import Samples
from iobs_onnx.runtime.data.self_written import SelfSamples
from iobs_onnx.runtime.data.table import TableSamples
from iobs_onnx.runtime.data.text import TextSamples
from iobs_onnx.runtime.device import find_device, share_of
from iobs_onnx.runtime.fidelity import NEVER_FINITE, Fidelity, OutputFidelity
from iobs_onnx.runtime.padding import Padding, find_padding
from iobs_onnx.runtime.session import (
    InputSpec,
    available_providers,
    input_specs,
    open_session,
    run_errors,
    session_info,
    settle_provider,
    taken,
)
from iobs_onnx.runtime.shapes import value_shapes
from iobs_onnx.runtime.store import Store
from iobs_onnx.runtime.stream import Batch, Spool, Stream, weighed

__all__ = [
    "NEVER_FINITE",
    "AudioSamples",
    "Batch",
    "Calibration",
    "Data",
    "Feed",
    "Fidelity",
    "ImageSamples",
    "InputSpec",
    "NoCallable",
    "NotFinite",
    "OutputFidelity",
    "Padding",
    "RandomSamples",
    "Samples",
    "SelfSamples",
    "Spool",
    "Store",
    "Stream",
    "Sums",
    "TableSamples",
    "TextSamples",
    "available_providers",
    "calibrate",
    "collect",
    "find_callable",
    "find_device",
    "find_padding",
    "input_specs",
    "join",
    "open_data",
    "open_session",
    "read_audio_config",
    "run_errors",
    "session_info",
    "settle_provider",
    "share_of",
    "taken",
    "value_shapes",
    "weighed",
    "with_random_tokens",
]
