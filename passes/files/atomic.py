"""Files that are either whole or not there, also after a crash of the machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a file beside a place to write; it is put there when the block ends well.

    What stood there stays until then, and for good where the block raises.

    Raises:
        OSError: the folder of the place does not exist or cannot be written.
    """
    place = Path(path).absolute()
    with replacing_all([place]) as folder:
        yield folder / place.name


@contextmanager
def replacing_all(places: Sequence[Path]) -> Iterator[Path]:
    """Give a folder for several files of one folder; they are put in their places together.

    When the block ends well, the files that it wrote under the names of the places reach the disk
    before the first is renamed, and are then renamed in order: what makes the others count comes
    last. A place whose file was not written is left as it is; other files go with the folder.

    Args:
        places: absolute paths in one existing folder.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    parent = places[-1].parent
    with tempfile.TemporaryDirectory(prefix=f".{places[-1].name}.", dir=parent) as folder:
        yield Path(folder)
        written = [place for place in places if Path(folder, place.name).exists()]
        for place in written:
            _flush(Path(folder, place.name))
        for place in written:
            os.replace(Path(folder, place.name), place)
        # The files are in place by now, and not every file system can do this.
        with suppress(OSError):
            _flush_folder(parent)


def _flush(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
