"""How the pages write numbers, counts and values of options."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape

NONE = "–"


def show(value: Any, form: str = "{:.4g}") -> str:
    """Format a number; what is not known (`null` in the report) becomes a dash."""
    return NONE if value is None else form.format(value)


def duration(seconds: float | None) -> str:
    """Write seconds as people do: `0.4 s`, `42 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count_of(number: int, one: str, many: str | None = None) -> str:
    """Write `1 weight`, `36 weights`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def clamp(value: float) -> str:
    """Write a percentage within 0 and 100."""
    return f"{min(100.0, max(0.0, value)):.2f}"


def option_text(value: Any) -> str:
    """Write the value of an option or a field."""
    if value is None or value == []:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(option_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def breakable(name: str) -> Markup:
    """Let a long name break after its dots, slashes and underscores."""
    text = escape(name)
    for mark in "./_":
        text = text.replace(mark, Markup(mark + "<wbr>"))  # one of three characters
    return text
