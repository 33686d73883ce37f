"""What `module:callable` names."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from iobs_onnx.errors import InputError


class NoCallable(InputError):
    """A module has nothing of a name, or what has that name cannot be called."""


def find_callable(name: str) -> Callable[..., Any]:
    """Return what `module:callable` names; `module:thing.method` is followed too.

    Raises:
        NoCallable: the module has nothing of that name, or nothing that can be called.
        Exception: whatever the module raises where it is imported, mostly an ImportError; a
            ValueError where no module is named.
    """
    # A console script does not see modules in the working directory, `python -m` does.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, inner = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in inner.split("."):
        if not hasattr(found, part):
            raise NoCallable(f"module {module!r} has no {inner!r}")
        found = getattr(found, part)
    if not callable(found):
        raise NoCallable(f"{inner!r} is not callable")
    function: Callable[..., Any] = found
    return function
