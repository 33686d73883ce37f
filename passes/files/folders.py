"""The folders that a run works in: its own while it lasts, gone after it, and what goes wrong."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from iobs_onnx.errors import OptionError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def scratch() -> Iterator[Path]:
    """Enter a temporary folder, which goes with the block.

    Raises:
        OptionError: as of :func:`working_in`, or there is no place for temporary folders.
    """
    remedy = "point TMPDIR at a larger disk"
    try:
        temporary = tempfile.TemporaryDirectory(prefix="iobs-onnx-", ignore_cleanup_errors=True)
    except OSError as error:
        raise OptionError(
            f"temporary folder: cannot be made ({error.strerror}); free some space, or {remedy}"
        ) from error
    with temporary as folder, working_in(Path(folder), remedy):
        yield Path(folder)


@contextmanager
def working_in(folder: Path, remedy: str) -> Iterator[None]:
    """Say in one line what the disk has against a folder that the block works in.

    Args:
        folder: absolute.
        remedy: what to do where it is full.

    Raises:
        OptionError: the disk is full, or the folder, or something in it, cannot be used any more.
    """
    try:
        yield
    except Exception as error:
        if not folder.is_dir():
            raise OptionError(
                f"folder {folder}: was removed while this run was using it; start it again"
            ) from error
        if not isinstance(error, OSError):
            raise
        inside = error.filename is not None and folder in Path(os.fsdecode(error.filename)).parents
        if error.errno in _FULL and (inside or error.filename is None):
            fault = f"is full ({error.strerror}); free some space, or {remedy}"
        elif inside:
            fault = f"{error.filename} cannot be used ({error.strerror}); start again"
        else:
            raise
        raise OptionError(f"folder {folder}: {fault}") from error


@contextmanager
def locked(place: Path, what: str) -> Iterator[None]:
    """Keep every other run away from a place while the block lasts.

    The lock is the system's, on a file that goes with the block: one of a run that was killed
    holds nobody up.

    Args:
        place: of the lock's file; its folder exists.
        what: what an error calls that which is locked.

    Raises:
        OptionError: another run holds the lock, or there can be none.
    """
    lock = FileLock(place)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise OptionError(f"{what}: another run uses it; wait for it, or give another") from error
    except OSError as error:
        raise OptionError(f"{what}: cannot be used ({error.strerror})") from error
    try:
        yield
    finally:
        with suppress(OSError):
            place.unlink()  # while it is held: who comes next makes a new one
        lock.release()


@contextmanager
def writing_to(output: str | os.PathLike[str] | None) -> Iterator[None]:
    """Make an output's folder, and keep it from other runs; an exception leaves neither behind.

    Args:
        output: a file that the block writes; None for none.

    Raises:
        OptionError: the folder cannot be made or written, or another run writes the same file.
    """
    if output is None:
        yield
        return
    place = Path(output).absolute()
    missing = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(
            f"output {output}: folder {place.parent} cannot be made ({error.strerror})"
        ) from error
    try:
        with locked(place.with_name(f".{place.name}.lock"), f"output {output}"):
            yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):  # others may have come to use it
                folder.rmdir()
        raise
