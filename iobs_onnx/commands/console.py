"""What the command line draws on: a console of the right width, and progress bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleDimensions
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from iobs_onnx.commands.printable import printable
from iobs_onnx.pruning.progress import Advance, Progress


def make_console() -> Console:
    """Return a console that colours nothing by itself, and shows names as they are."""
    console = _Console(highlight=False, markup=False, emoji=False)
    # A pipe has no width: 80 columns would fold every name.
    if not console.is_terminal:
        console.size = ConsoleDimensions(160, console.height)
    return console


class _Console(Console):
    """Escapes control characters; leaves it to the command line to end where nobody reads."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text), **how)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError


class Bars(Progress):
    """Progress bars on a terminal: steps done, time taken and left, and what a stage says."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Advance]:
        """Draw one bar while the stage lasts."""
        columns = (
            TextColumn("{task.description:>10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"),
        )
        with RichProgress(*columns, console=self._console) as bars:
            task = bars.add_task(name, total=total, said="")

            def advance(said: str = "", total: int | None = None) -> None:
                bars.update(task, advance=1, said=said, total=total)

            yield advance
