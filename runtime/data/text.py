"""Text as calibration data, through a `tokenizer.json` of the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.errors import DataError, OptionError
from iobs_onnx.runtime.data.feeds import Feed
from iobs_onnx.runtime.data.samples import Samples, files_below, require
from iobs_onnx.runtime.data.tokens import DEFAULT_LENGTH, IDS, row_length, token_feed
from iobs_onnx.runtime.session import InputSpec

_SUFFIXES = frozenset({".txt", ".md", ".jsonl"})
# A SentencePiece model is binary, and does not say which special tokens its model expects.
_NO_JSON = (
    "not a tokenizer.json; where it is a SentencePiece model (tokenizer.model), take the "
    "tokenizer.json that is published with it, or give token ids: --calibration FILE.jsonl with "
    "a list `input_ids` in each line"
)
_PADS = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")


class TextSamples(Samples):
    """Every line of a text file, or every `"text"` of a `.jsonl`, is a text; empty ones are not.

    Texts are cut at `length` tokens and padded to the longest of their feed, sorted by length so
    that there is little to pad. With `pack` all texts follow one another, and a sample is
    `length` tokens of that stream; what does not fill the last one is dropped.

    Args:
        path: a file, or a directory below which every .txt, .md and .jsonl is read.
        tokenizer: a `tokenizer.json`.
        inputs: of the model, from :func:`iobs_onnx.runtime.input_specs`.
        length: tokens in a sample, special ones included. Default: what the model fixes, else 128.
        pack: whether to pack.
        vocabulary: the number of tokens that the model looks up; None where that is not known.

    Raises:
        DataError: a file cannot be read, there is no text, the model takes no `input_ids`, or the
            tokenizer gives tokens that it does not know.
        DependencyError: the `tokenizers` library is missing.
        OptionError: the length is not the one that the model is made for.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str,
        inputs: Sequence[InputSpec],
        *,
        length: int | None = None,
        pack: bool = False,
        vocabulary: int | None = None,
    ) -> None:
        self.label = f"text {path}"
        self._inputs = inputs
        ids = next((spec for spec in inputs if spec.name == IDS), None)
        if ids is None:
            names = ", ".join(spec.name for spec in inputs)
            raise DataError(f"{self.label}: the model has no input {IDS!r} but {names}; give feeds")
        self._length, self._fixed = row_length(ids, length, DEFAULT_LENGTH)
        coder = _Coder(tokenizer)
        texts = [text for file in files_below(path, _SUFFIXES, "text") for text in _texts(file)]
        if not texts:
            raise DataError(f"{self.label}: it holds no text")
        self._pad = coder.pad
        if pack:
            stream = np.concatenate(coder.encode(texts, None))
            count = len(stream) // self._length
            if count == 0:
                raise OptionError(
                    f"sequence_length {self._length}: {self.label} holds {len(stream)} tokens, "
                    "which do not fill one sequence; leave out --pack or give more text"
                )
            self._rows = list(stream[: count * self._length].reshape(count, self._length))
        else:
            self._rows = sorted(coder.encode(texts, self._length), key=len)
        if vocabulary is not None:
            self._require_known(coder.size, vocabulary, tokenizer)

    def _require_known(self, size: int, vocabulary: int, tokenizer: str) -> None:
        largest = max((int(row.max()) for row in (*self._rows, np.array([self._pad]))), default=0)
        if largest >= vocabulary:
            raise DataError(
                f"tokenizer {tokenizer}: gives token {largest}, and the model looks up {vocabulary}"
                "; give the tokenizer that the model was trained with"
            )
        if size != vocabulary:
            self.notes = (
                f"the tokenizer has {size} tokens, the model {vocabulary}: see that they belong "
                "together",
            )

    def __len__(self) -> int:
        return len(self._rows)

    def feed(self, index: Sequence[int]) -> Feed:
        """Return the texts as ids, padded, with the masks that the model takes."""
        rows = [self._rows[at] for at in index]
        length = self._length if self._fixed else max(map(len, rows))
        return token_feed(rows, self._inputs, self._pad, length)


class _Coder:
    """A tokenizer without the truncation and padding that its file may ask for."""

    def __init__(self, path: str) -> None:
        library = require("tokenizers", "text", f"text through tokenizer {path}")
        try:
            content = Path(path).read_bytes().decode("utf-8")
        except OSError as error:
            raise DataError(f"tokenizer {path}: cannot be read: {error}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"tokenizer {path}: {_NO_JSON}") from error
        try:
            self._tokenizer = library.Tokenizer.from_str(content)
        except Exception as error:  # the library raises this very class for all that is wrong
            raise DataError(f"tokenizer {path}: not a tokenizer.json: {error}") from error
        padding = self._tokenizer.padding
        ids = [self._tokenizer.token_to_id(token) for token in _PADS]
        known = [number for number in ids if number is not None]
        # Padding is masked out, so any token does where none is named.
        self.pad: int = padding["pad_id"] if padding else next(iter(known), 0)
        self._tokenizer.no_padding()
        self.size: int = self._tokenizer.get_vocab_size()

    def encode(self, texts: Sequence[str], length: int | None) -> list[NDArray[np.int64]]:
        """Return the ids of each text, special tokens included, cut at `length`."""
        if length is None:
            self._tokenizer.no_truncation()
        else:
            self._tokenizer.enable_truncation(length)
        encoded = (np.array(item.ids, np.int64) for item in self._tokenizer.encode_batch(texts))
        return [ids for ids in encoded if len(ids)]


def _texts(file: Path) -> Iterator[str]:
    """Yield the texts of one file."""
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                text = _field(line, f"text {file} line {number}") if _is_json(file) else line
                if text.strip():
                    yield text.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"text {file}: cannot be read as UTF-8 text: {error}") from error


def _is_json(file: Path) -> bool:
    return file.suffix.lower() == ".jsonl"


def _field(line: str, label: str) -> str:
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{label}: not JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise DataError(f'{label}: expected a string, or an object with a string "text"')
    return text
