"""What the command line draws on: a console of the right width, and progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from iobs_onnx.pruning.progress import Progress


def make_console() -> Console:
    """Return a console that colours nothing by itself and reads no markup in names."""
    console = _Console(highlight=False, markup=False)
    # A pipe has no width: 80 columns would fold every name.
    return console if console.is_terminal else _Console(highlight=False, markup=False, width=160)


class _Console(Console):
    """Leaves it to the command line to end where nobody reads any more; rich exits with 1."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError


class Bars(Progress):
    """Progress bars on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Callable[[], None]]:
        """Draw one bar while the stage lasts."""
        columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn())
        with RichProgress(*columns, TimeElapsedColumn(), console=self._console) as bars:
            task = bars.add_task(name, total=total)
            yield lambda: bars.advance(task)
