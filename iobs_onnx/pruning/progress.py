"""How a long run says how far it is; the command line draws bars, the library says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """To be called after each step of a stage."""

    def __call__(self, said: str = "", total: int | None = None) -> None:
        """Go on by one step.

        Args:
            said: how well it goes, in a few words.
            total: the number of steps, where it was found only now.
        """


def silent(said: str = "", total: int | None = None) -> None:
    """Say nothing."""


class Progress:
    """Silent progress; wrap or replace it to draw something."""

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Advance]:
        """Enter a stage of `total` steps (None: unknown); call what is yielded after each."""
        yield silent
