"""Exports of kinds that users hold: language models, mixtures of experts, text to speech."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

DATA = Path(__file__).parent / "data"
# By ONNX Runtime GenAI's builder, and by torch: see integrations/genai.py and operators/experts.py.
LANGUAGE = {
    "genai fp32": DATA / "genai-fp32" / "model.onnx",
    "genai int4": DATA / "genai-int4" / "model.onnx",
    "mixtral": DATA / "mixtral.onnx",
    "qwen2-moe": DATA / "qwen2_moe.onnx",
}
_HEAD, _VOCABULARY = 16, 30


def language_feed(
    model: onnx.ModelProto, rows: int = 2, length: int = 24, seed: int = 0
) -> dict[str, NDArray[np.generic]]:
    """Return random tokens with all of the mask set and nothing in the caches."""
    draw, feed = np.random.default_rng(seed), {}
    for info in model.graph.input:
        kind = info.type.tensor_type
        if info.name.startswith("past"):
            shape = (rows, kind.shape.dim[1].dim_value, 0, _HEAD)
            feed[info.name] = np.zeros(shape, helper.tensor_dtype_to_np_dtype(kind.elem_type))
        elif info.name == "attention_mask":
            feed[info.name] = np.ones((rows, length), np.int64)
        elif kind.elem_type == TensorProto.INT64:
            feed[info.name] = draw.integers(0, _VOCABULARY, (rows, length))
    return feed


def speech(path: Path) -> Path:
    """Export a small random VITS, whose output is as long as the durations it predicts."""
    import torch
    from transformers import VitsConfig, VitsModel

    torch.manual_seed(0)
    config = VitsConfig(
        vocab_size=_VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        flow_size=16,
        spectrogram_bins=17,
        upsample_initial_channel=32,
        upsample_rates=[4, 2],
        upsample_kernel_sizes=[8, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        prior_encoder_num_flows=2,
        prior_encoder_num_wavenet_layers=2,
        posterior_encoder_num_wavenet_layers=2,
        duration_predictor_filter_channels=16,
        use_stochastic_duration_prediction=False,
        noise_scale=0.0,
        noise_scale_duration=0.0,
    )

    class Waveform(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = VitsModel(config)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids).waveform

    torch.onnx.export(
        Waveform().eval(),
        (torch.ones(1, 12, dtype=torch.int64),),
        path,
        input_names=["input_ids"],
        output_names=["waveform"],
        dynamic_axes={"input_ids": {1: "tokens"}, "waveform": {1: "samples"}},
        opset_version=17,
        dynamo=False,
    )
    return path
