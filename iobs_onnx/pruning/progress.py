"""How a long run says how far it is; the command line draws bars, the library says nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Silent progress; wrap or replace it to draw something."""

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Callable[[], None]]:
        """Enter a stage of `total` steps (None: unknown); call what is yielded after each."""
        yield lambda: None
