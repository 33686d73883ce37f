"""Which outputs a model is judged by, and which are told of one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_CACHE = "present"


def judged(names: Sequence[str]) -> list[str]:
    """Return the outputs that a model is judged by: no caches of keys and values, unless only they.

    A language model has two a layer, beside which its logits would hardly count.
    """
    return [name for name in names if not name.startswith(_CACHE)] or list(names)


def outputs_told(outputs: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """Return the outputs to tell one by one, and a line on the caches beside them, or nothing."""
    names = judged([output["name"] for output in outputs])
    told = [output for output in outputs if output["name"] in names]
    caches = [output for output in outputs if output["name"] not in names]
    if not caches:
        return told, ""
    line = f"{len(caches)} cache{'s' * (len(caches) > 1)} of keys and values, not judged by"
    errors = [output["relative_error"] for output in caches]
    if None not in errors:
        line += f": mean relative error {sum(errors) / len(errors):.4f}"
    return told, line
