"""Models that hear or speak, and recurrent ones: ready-made feeds, or text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from made import Made, export, packaged, save_feeds, session, stays_near

RATE = 16_000


def recording(seconds: int, seed: int) -> np.ndarray:
    """Bursts of harmonics between silences, `(seconds * RATE,)` float32."""
    draw = np.random.default_rng(seed)
    time = np.arange(RATE // 4) / RATE
    pieces = []
    for _ in range(seconds * 4):
        pitch, loud = draw.uniform(90, 220), draw.choice([0.0, 0.3, 0.6])
        tone = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 12))
        pieces.append(loud * tone * np.hanning(len(time)) + draw.normal(0, 0.005, len(time)))
    return np.concatenate(pieces).astype(np.float32)


def lstm(folder: Path) -> Made:
    """Two layers of LSTM in both directions over vectors, random weights."""
    import torch

    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = torch.nn.LSTM(24, 32, 2, bidirectional=True, batch_first=True)
            self.head = torch.nn.Linear(64, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0])

    torch.manual_seed(0)
    model = export(
        Tagger(),
        {"x": torch.zeros(2, 20, 24)},
        folder / "model.onnx",
        "tags",
        {"x": {0: "batch", 1: "time"}},
        dynamo=False,
    )

    def vectors(count: int, seed: int) -> np.ndarray:
        draw = np.random.default_rng(seed)
        return draw.normal(size=(count, 20, 24)).cumsum(1).astype(np.float32) / 4

    np.savez(folder / "vectors.npz", x=vectors(96, 0))
    data = ["--calibration", str(folder / "vectors.npz")]
    return Made(model, data, stays_near(model, [{"x": vectors(16, 9)}], 0.7))


def listen(
    model: Path, sound: np.ndarray, rate: int = 16_000
) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    """Run Silero VAD along a recording; return its feeds, and the speech probability of each."""
    chunk, context = rate // 500 * 16, rate // 250
    opened = session(model)
    state, feeds, found = np.zeros((2, 1, 128), np.float32), [], []
    padded = np.concatenate([np.zeros(context, np.float32), sound])
    for start in range(0, len(sound) - chunk + 1, chunk):
        piece = padded[start : start + context + chunk][None]
        feeds.append({"input": piece, "state": state, "sr": np.array(rate, np.int64)})
        probability, state = opened.run(None, feeds[-1])
        found.append(probability.item())
    return feeds, np.array(found)


def silero(folder: Path) -> Made:
    """Silero VAD, trained: an LSTM for each of two sampling rates, in the branches of an If."""
    model = packaged("silero_vad") / "data" / "silero_vad.onnx"
    feeds = [
        feed
        for rate in (8_000, 16_000)
        for feed in listen(model, recording(5, 0)[:: RATE // rate], rate)[0]
    ]

    def use(sparse: Path) -> None:
        """Along a recording, its own states handed on."""
        sound = recording(4, 9)
        dense, found = (listen(m, sound)[1] for m in (model, sparse))
        assert np.isfinite(found).all()
        assert np.mean((dense > 0.5) == (found > 0.5)) > 0.7

    return Made(model, save_feeds(folder / "feeds", feeds), use)


def whisper(folder: Path) -> Made:
    """Whisper in a small random configuration: spectrograms and tokens to logits."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=200,
        num_mel_bins=16,
        d_model=48,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_source_positions=40,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        attn_implementation="eager",
        use_cache=False,
    )

    model = export(
        WhisperForConditionalGeneration(config),
        {
            "input_features": torch.zeros(2, 16, 80),
            "decoder_input_ids": torch.ones(2, 12, dtype=torch.int64),
        },
        folder / "model.onnx",
        "logits",
        {"input_features": {0: "batch"}, "decoder_input_ids": {0: "batch", 1: "tokens"}},
        dynamo=True,
    )

    def heard(seed: int) -> dict[str, np.ndarray]:
        draw = np.random.default_rng(seed)
        ids = draw.integers(3, 200, (2, int(draw.integers(4, 20))))
        features = draw.normal(size=(2, 16, 80)).cumsum(-1) / 9
        return {"input_features": features.astype(np.float32), "decoder_input_ids": ids}

    def use(sparse: Path) -> None:
        """Write down what is heard, a token after the other."""
        stays_near(model, [heard(seed) for seed in range(100, 104)], 0.9)(sparse)
        running, feed = session(sparse), heard(200)
        told = np.ones((2, 1), np.int64)
        for _ in range(8):
            (logits,) = running.run(["logits"], {**feed, "decoder_input_ids": told})
            told = np.concatenate([told, logits[:, -1:].argmax(-1)], axis=1)
        assert told.shape == (2, 9)

    data = save_feeds(folder / "feeds", [heard(seed) for seed in range(40)])
    return Made(model, data, use)


def vits(folder: Path) -> Made:
    """Text to speech by VITS, small and random; the durations that it predicts set the length."""
    import torch
    from languages import letters, text_of
    from transformers import VitsConfig, VitsModel

    torch.manual_seed(0)
    config = VitsConfig(
        vocab_size=letters(folder),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        window_size=4,
        ffn_dim=64,
        flow_size=32,
        spectrogram_bins=33,
        use_stochastic_duration_prediction=False,
        duration_predictor_filter_channels=32,
        prior_encoder_num_flows=2,
        prior_encoder_num_wavenet_layers=2,
        upsample_initial_channel=64,
        upsample_rates=[4, 4],
        upsample_kernel_sizes=[8, 8],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3]],
        noise_scale=0.0,
    )

    ids = torch.ones(1, 24, dtype=torch.int64)
    model = export(
        VitsModel(config),
        {"input_ids": ids, "attention_mask": ids},
        folder / "model.onnx",
        "waveform",
        {name: {1: "tokens"} for name in ("input_ids", "attention_mask")},
        dynamo=False,
    )
    data = text_of(folder, 24, 48, folder / "tokenizer.json")

    def use(sparse: Path) -> None:
        said = np.random.default_rng(5).integers(0, 20, (1, 30))
        feed = {"input_ids": said, "attention_mask": np.ones_like(said)}
        (waveform,) = session(sparse).run(None, feed)
        assert waveform.shape[0] == 1
        assert waveform.shape[1] > 0
        assert np.isfinite(waveform).all()

    return Made(model, [*data, "--batch-size", "1"], use)
