"""Text for a terminal: names may hold what moves its cursor or writes to its clipboard."""

from __future__ import annotations

import json
import logging
from typing import Any


def printable(text: str, keep: str = "") -> str:
    """Return text whose control characters, and all else that shows nothing, are escaped.

    Args:
        text: from anywhere.
        keep: characters that stay.
    """
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape").decode()
        for each in text
    )


def to_json(value: Any) -> str:
    """Return indented JSON with the letters of all languages, and nothing that a terminal obeys."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(
        each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text
    )


class Formatter(logging.Formatter):
    """Formats what is logged for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, escaped."""
        return printable(super().format(record), keep="\n")
