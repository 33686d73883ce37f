"""Samples that are read and made into feeds only when they are asked for.

Texts, images, recordings and rows of tables are all this, so that choosing, holding out and
batching are written once, in :func:`iobs_onnx.runtime.open_data`, and memory holds one batch.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from types import ModuleType

from iobs_onnx.errors import DataError, DependencyError
from iobs_onnx.runtime.data.feeds import Feed


class Samples(ABC):
    """A number of samples, any of which can be batched into a feed.

    Attributes:
        label: what they are and where they lie, for messages and the report.
        notes: what a report must say of them.
    """

    label: str
    notes: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Return how many there are."""

    @abstractmethod
    def feed(self, index: Sequence[int]) -> Feed:
        """Return the samples at these indices as one feed; the first axis of inputs is samples.

        Raises:
            DataError: one of them cannot be read, or they do not fit together.
        """


def files_below(path: str, suffixes: Collection[str], what: str) -> tuple[Path, ...]:
    """Return the file `path`, or those with one of `suffixes` anywhere below a directory, sorted.

    Raises:
        DataError: there is none.
    """
    root = Path(path)
    if root.is_file():
        return (root,)
    if not root.is_dir():
        raise DataError(f"{what} {path}: no such file or directory")
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    if not found:
        raise DataError(f"{what} {path}: holds no {', '.join(sorted(suffixes))} file")
    return tuple(found)


def require(module: str, extra: str, what: str) -> ModuleType:
    """Import a module that an extra of this package installs.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"{what} needs {module}: pip install 'iobs-onnx[{extra}]' ({error})"
        ) from error
