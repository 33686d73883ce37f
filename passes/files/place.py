"""A model's folder: what else lies in it, and goes with the model to another one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iobs_onnx.errors import OptionError
from iobs_onnx.passes.files.load_save import model_files

# A folder that holds one of these is a model's own: ONNX Runtime GenAI's, Optimum's.
_MARKS = ("genai_config.json", "config.json")


@dataclass(frozen=True)
class Place:
    """Where a model is written, and what goes with it.

    Attributes:
        file: the model's; None where it stays in memory.
        beside: files that are copied into its folder.
    """

    file: str | os.PathLike[str] | None
    beside: tuple[Path, ...] = ()


def place_of(output: str | os.PathLike[str] | None, model: Any) -> Place:
    """Return the place that an output names.

    An output that is a folder, or ends with a slash, takes the model under its own name. With it
    go all other files of the model's folder, where that is a model's own: it holds a
    `genai_config.json` or a `config.json`. The output's folder is made if it does not exist.

    Args:
        output: as it was given.
        model: as it was given.

    Raises:
        OptionError: the output is a folder and the model in memory, or it cannot be made.
        ModelError: as :func:`iobs_onnx.passes.load_model`.
    """
    if output is None or not (Path(output).is_dir() or os.fspath(output).endswith(os.sep)):
        return Place(output)
    if not isinstance(model, str | os.PathLike):
        raise OptionError(f"output {output}: is a folder; name the file for a model in memory")
    own = model_files(model)
    folder = own[0].parent
    beside: tuple[Path, ...] = ()
    if any((folder / mark).is_file() for mark in _MARKS):
        others = (file for file in folder.iterdir() if file.is_file() and file not in own)
        beside = tuple(sorted(others))
    try:
        Path(output).mkdir(exist_ok=True)
    except OSError as error:
        raise OptionError(f"output {output}: cannot be made ({error.strerror})") from error
    return Place(Path(output) / own[0].name, beside)
