"""Texts, images, recordings, tables and random numbers as calibration data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from iobs_onnx.errors import DataError, DependencyError, OptionError
from iobs_onnx.runtime import (
    AudioSamples,
    ImageSamples,
    InputSpec,
    RandomSamples,
    TextSamples,
    open_data,
    read_audio_config,
)
from iobs_onnx.runtime.data.random_numbers import WARNING
from iobs_onnx.runtime.data.samples import require

I64, F32 = np.dtype(np.int64), np.dtype(np.float32)
BERT = tuple(
    InputSpec(name, I64, (None, None)) for name in ("input_ids", "attention_mask", "token_type_ids")
)
LLAMA = (
    InputSpec("input_ids", I64, (None, None)),
    InputSpec("attention_mask", I64, (None, None)),
    InputSpec("position_ids", I64, (None, None)),
    InputSpec("past_key_values.0.key", F32, (None, 3, None, 8)),
)
TEXTS = [f"the {'very ' * (i % 7)}small sentence number {i}" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Path:
    import minilm

    return minilm.weights_folder() / "tokenizer.json"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS[:20]) + "\n")
    lines = [json.dumps({"text": text, "label": 1}) for text in TEXTS[20:]]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    (tmp_path / "c.csv").write_text("not read")
    return tmp_path


# --- text


def test_texts_are_those_that_transformers_encodes(texts: Path, tokenizer: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer), pad_token="[PAD]")
    samples = TextSamples(str(texts), str(tokenizer), BERT, length=9)
    assert len(samples) == 40
    feed = samples.feed(range(40))
    encoded = reference(sorted(TEXTS), max_length=9, truncation=True, padding=True)
    expected = sorted(map(tuple, encoded["input_ids"]))
    assert sorted(map(tuple, feed["input_ids"].tolist())) == expected
    assert (feed["attention_mask"] == (feed["input_ids"] != 0)).all()
    assert not feed["token_type_ids"].any()
    # Sorted by length: a feed is padded no further than its own longest text.
    assert samples.feed([0, 1])["input_ids"].shape[1] < samples.feed([38, 39])["input_ids"].shape[1]


def test_packing_is_one_stream_of_all_tokens(texts: Path, tokenizer: Path) -> None:
    from tokenizers import Tokenizer

    coder = Tokenizer.from_file(str(tokenizer))
    coder.no_padding()
    coder.no_truncation()
    stream = [token for item in coder.encode_batch(TEXTS) for token in item.ids]
    samples = TextSamples(str(texts), str(tokenizer), LLAMA, length=32, pack=True)
    feed = samples.feed(range(len(samples)))
    assert feed["input_ids"].ravel().tolist() == stream[: len(stream) // 32 * 32]
    assert feed["attention_mask"].all()
    assert (feed["position_ids"] == np.arange(32)).all()
    assert feed["past_key_values.0.key"].shape == (len(samples), 3, 0, 8)


def test_text_is_batched_held_out_and_checked(texts: Path, tokenizer: Path) -> None:
    data = open_data(TextSamples(str(texts), str(tokenizer), BERT), BERT, batch_size=8)
    lengths = [len(feed["input_ids"]) for feed in data.calibration]
    assert (data.samples, data.held_out_samples, lengths) == (36, 4, [8, 8, 8, 8, 4])


def test_a_tokenizer_of_another_vocabulary_is_refused_or_told(texts: Path, tokenizer: Path) -> None:
    with pytest.raises(DataError, match=r"gives token \d+, and the model looks up 1000; give the"):
        TextSamples(str(texts), str(tokenizer), BERT, vocabulary=1000)
    (note,) = TextSamples(str(texts), str(tokenizer), BERT, vocabulary=40000).notes
    assert note.startswith("the tokenizer has 30522 tokens, the model 40000")
    assert TextSamples(str(texts), str(tokenizer), BERT, vocabulary=30522).notes == ()


def test_a_model_of_fixed_length_gets_that(texts: Path, tokenizer: Path) -> None:
    fixed = tuple(InputSpec(spec.name, I64, (None, 24)) for spec in BERT)
    samples = TextSamples(str(texts), str(tokenizer), fixed)
    assert samples.feed([0, 1])["input_ids"].shape == (2, 24)
    with pytest.raises(OptionError, match="sequence_length 32: input 'input_ids' is made for 24"):
        TextSamples(str(texts), str(tokenizer), fixed, length=32)


@pytest.mark.parametrize(
    ("content", "text"),
    [("", "holds no text"), ('{"txt": "a"}', "line 1: expected a string"), ("{", "not JSON")],
)
def test_text_that_cannot_be_read_is_named(
    tmp_path: Path, tokenizer: Path, content: str, text: str
) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(DataError, match=text):
        TextSamples(str(tmp_path / "t.jsonl"), str(tokenizer), BERT)


def test_tokenizers_and_inputs_that_do_not_fit_are_named(texts: Path, tokenizer: Path) -> None:
    binary = texts / "tokenizer.model"
    binary.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\xff")
    with pytest.raises(DataError, match=r"SentencePiece model .* give token ids: --calibration"):
        TextSamples(str(texts), str(binary), BERT)
    with pytest.raises(DataError, match=r"a\.txt: not a tokenizer\.json"):
        TextSamples(str(texts), str(texts / "a.txt"), BERT)
    with pytest.raises(DataError, match=r"absent\.json: cannot be read"):
        TextSamples(str(texts), "absent.json", BERT)
    (texts / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.jsonl, \.md, \.txt file"):
        TextSamples(str(texts / "empty"), str(tokenizer), BERT)
    with pytest.raises(DataError, match="no input 'input_ids' but x"):
        TextSamples(str(texts), str(tokenizer), (InputSpec("x", F32, (None, 3)),))
    more = (*BERT, InputSpec("pixels", F32, (None, 3)))
    with pytest.raises(DataError, match="input 'pixels': tokens do not determine it"):
        TextSamples(str(texts), str(tokenizer), more).feed([0])
    with pytest.raises(OptionError, match="do not fill one sequence"):
        TextSamples(str(texts), str(tokenizer), BERT, length=10**6, pack=True)


# --- images


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    from PIL import Image

    rng = np.random.default_rng(0)
    for i, size in enumerate([(40, 30), (33, 64), (50, 50)]):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
    return tmp_path


CLIP = {
    "do_resize": True,
    "size": {"shortest_edge": 24},
    "do_center_crop": True,
    "crop_size": {"height": 16, "width": 20},
    "do_normalize": True,
    "image_mean": [0.48, 0.45, 0.40],
    "image_std": [0.26, 0.26, 0.27],
    "resample": 3,
}
CONVNEXT = {
    "size": {"shortest_edge": 28},
    "crop_pct": 0.875,
    "resample": 3,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
VIT = {"size": {"height": 18, "width": 12}, "resample": 2, "do_normalize": False}


@pytest.mark.parametrize(
    ("module", "name", "asked"),
    [
        ("clip.image_processing_pil_clip", "CLIPImageProcessorPil", CLIP),
        ("convnext.image_processing_pil_convnext", "ConvNextImageProcessorPil", CONVNEXT),
        ("vit.image_processing_pil_vit", "ViTImageProcessorPil", VIT),
    ],
)
def test_images_are_prepared_as_transformers_does(
    pictures: Path, module: str, name: str, asked: dict[str, object]
) -> None:
    import importlib

    from PIL import Image

    (pictures / "p.json").write_text(json.dumps(asked))
    spec = (InputSpec("pixel_values", F32, (None, 3, None, None)),)
    samples = ImageSamples(str(pictures), str(pictures / "p.json"), spec)
    ours = samples.feed(range(3))["pixel_values"]
    processor = getattr(importlib.import_module(f"transformers.models.{module}"), name)(**asked)
    opened = [Image.open(pictures / f"{i}.png") for i in range(3)]
    theirs = np.stack(processor(opened)["pixel_values"])
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-5


def test_channels_last_grey_and_other_types(pictures: Path) -> None:
    (pictures / "p.json").write_text('{"size": [8, 6], "do_rescale": false}')
    spec = (InputSpec("x", np.dtype(np.uint8), (None, 8, 6, 1)),)
    array = ImageSamples(str(pictures), str(pictures / "p.json"), spec).feed([0, 1])["x"]
    assert (array.shape, array.dtype) == ((2, 8, 6, 1), np.uint8)
    assert array.std() > 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"do_pad": true}', "do_pad is not supported"),
        ('{"size": {"longest_edge": 3}}', "KeyError 'height'"),
        ("[]", "expected a JSON object"),
        ("{", "cannot be read as JSON"),
        ("{}", "images of a batch have shapes"),
    ],
)
def test_preprocessing_that_is_not_understood_is_refused(
    pictures: Path, content: str, text: str
) -> None:
    (pictures / "p.json").write_text(content)
    spec = (InputSpec("x", F32, (None, 3, None, None)),)
    with pytest.raises(DataError, match=text):
        ImageSamples(str(pictures), str(pictures / "p.json"), spec).feed([0, 1])


def test_images_that_cannot_be_read_or_fed_are_named(pictures: Path) -> None:
    (pictures / "p.json").write_text('{"size": 8}')
    (pictures / "9.png").write_bytes(b"no picture")
    spec = InputSpec("x", F32, (None, 3, None, None))
    with pytest.raises(DataError, match=r"image .*9\.png: cannot be read"):
        ImageSamples(str(pictures), str(pictures / "p.json"), (spec,)).feed([3])
    with pytest.raises(DataError, match="expected one input of four axes"):
        ImageSamples(str(pictures), str(pictures / "p.json"), (spec, spec))
    wide = (InputSpec("x", F32, (None, 7, None, 9)),)
    with pytest.raises(DataError, match="images have 1 or 3 channels"):
        ImageSamples(str(pictures), str(pictures / "p.json"), wide)


# --- audio


def tone(path: Path, rate: int, seconds: float, hertz: float = 440.0) -> None:
    import wave

    time = np.arange(int(rate * seconds)) / rate
    signal = (np.sin(2 * np.pi * hertz * time) * 16384).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.stack([signal, signal], axis=1).tobytes())


def test_recordings_are_cut_into_pieces_and_resampled(tmp_path: Path) -> None:
    tone(tmp_path / "a.wav", 16000, 0.5)
    tone(tmp_path / "b.wav", 48000, 0.55)
    tone(tmp_path / "c.wav", 16000, 0.05)
    spec = (InputSpec("input", F32, (None, None)), InputSpec("sr", I64, ()))
    samples = AudioSamples(str(tmp_path), spec, rate=16000, length=4000)
    assert len(samples) == 2 + 2 + 1
    feed = samples.feed(range(5))
    assert feed["sr"] == 16000
    expected = np.sin(2 * np.pi * 440 * np.arange(4000) / 16000) / 2
    assert np.abs(feed["input"][0] - expected).max() < 1e-4
    inner = slice(200, -200)  # a resampler needs neighbours
    assert np.abs(feed["input"][2][inner] - expected[inner]).max() < 1e-3
    assert not feed["input"][4][800:].any()


def test_waveforms_normalised_as_wav2vec2_wants_them(tmp_path: Path) -> None:
    tone(tmp_path / "a.wav", 8000, 1)
    (tmp_path / "p.json").write_text('{"sampling_rate": 8000, "do_normalize": true}')
    rate, normalize = read_audio_config(str(tmp_path / "p.json"))
    spec = (InputSpec("input_values", F32, (None, 1, None)),)
    feed = AudioSamples(str(tmp_path), spec, rate=rate, normalize=normalize).feed([0])
    from transformers import Wav2Vec2FeatureExtractor

    wave = (np.sin(2 * np.pi * 440 * np.arange(8000) / 8000) * 16384).astype("<i2") / 32768
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000)
    (expected,) = extractor(wave, sampling_rate=8000)["input_values"]
    assert feed["input_values"].shape == (1, 1, 8000)
    assert np.abs(feed["input_values"][0, 0] - expected).max() < 1e-4


def test_recordings_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF no sound")
    with pytest.raises(DataError, match=r"a\.wav: cannot be read"):
        AudioSamples(str(tmp_path), (InputSpec("x", F32, (None, None)),), rate=16000)
    spectrogram = (InputSpec("input_features", F32, (None, 80, 3000)),)
    with pytest.raises(DataError, match="expected one waveform"):
        AudioSamples(str(tmp_path), spectrogram, rate=16000)
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(DataError, match='with "sampling_rate"'):
        read_audio_config(str(tmp_path / "p.json"))


# --- tables

XY = (InputSpec("x", F32, (None, 2)), InputSpec("n", I64, (None,)))
ROWS = [{"x": [i, i / 2], "n": i, "label": "a"} for i in range(20)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_a_table_are_samples(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)))
    data = open_data(path, XY, samples=18, batch_size=6)
    feeds = [*data.calibration, *data.held_out]
    seen = np.concatenate([feed["n"] for feed in feeds])
    assert sorted(seen) == list(range(20))
    assert seen.dtype == np.int64
    found = np.concatenate([feed["x"] for feed in feeds])
    assert (found == np.stack([seen, seen / 2], axis=1)).all()
    assert found.dtype == np.float32


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"x": [1, 2]}], "input 'n' is missing"),
        ([{"x": [1, 2], "n": 1.5}], "input 'n' holds float64, the model takes int64"),
        ([{"x": [1, 2], "n": 1}, {"x": [1], "n": 1}], "differ in shape"),
        ([{"x": [1, "a"], "n": 1}], "input 'x' holds"),
        ([[1]], "expected an object"),
        ([], "holds no rows"),
    ],
)
def test_tables_that_do_not_fit_are_named(tmp_path: Path, rows: list[object], text: str) -> None:
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=text):
        list(open_data(tmp_path / "t.jsonl", XY, holdout=0).calibration)


def test_a_broken_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read as parquet"):
        open_data(tmp_path / "t.parquet", XY)


def test_rows_of_tokens_are_padded_and_completed(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8]}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (feed,) = open_data(tmp_path / "t.jsonl", LLAMA, holdout=0).calibration
    assert feed["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert feed["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert feed["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert feed["past_key_values.0.key"].shape == (2, 3, 0, 8)


# --- random numbers


def test_random_samples_fit_the_model_and_warn() -> None:
    data = open_data(RandomSamples(LLAMA, ("input_ids", 50), length=12), LLAMA)
    assert data.notes == [WARNING]
    feed = next(iter(data.calibration))
    assert feed["input_ids"].shape == (16, 12)
    assert feed["input_ids"].max() == 49
    assert feed["attention_mask"].all()
    again = next(
        iter(open_data(RandomSamples(LLAMA, ("input_ids", 50), length=12), LLAMA).calibration)
    )
    assert (again["input_ids"] == feed["input_ids"]).all()
    plain = (
        InputSpec("x", F32, (4, None, 5)),
        InputSpec("k", I64, ()),
        InputSpec("b", np.dtype(bool), (4,)),
    )
    feed = next(iter(open_data(RandomSamples(plain, length=3), plain).calibration))
    assert feed["x"].shape == (4, 3, 5)
    assert abs(float(feed["x"].mean())) < 0.6


def test_floats_beside_tokens_are_random_too() -> None:
    """A model of text and images: what tokens do not determine is drawn like all else."""
    both = (*BERT, InputSpec("pixels", F32, (None, 3, None)), InputSpec("flag", I64, (None,)))
    feed = RandomSamples(both, ("input_ids", 50), length=6).feed([0, 1, 2])
    assert feed["input_ids"].shape == (3, 6)
    assert feed["pixels"].shape == (3, 3, 6)
    assert feed["pixels"].std() > 0.5
    assert set(feed["flag"]) <= {0, 1}


def test_a_library_that_is_missing_names_the_extra() -> None:
    with pytest.raises(
        DependencyError, match=r"x needs absent_library: pip install 'iobs-onnx\[y\]'"
    ):
        require("absent_library", "y", "x")
