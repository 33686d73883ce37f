"""What values options may take; each check names the option in one line."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from iobs_onnx.errors import OptionError
from iobs_onnx.sparsity import NM, parse_sparsity

# Takes an option's name and the value given; returns the value as it is kept.
Check: TypeAlias = Callable[[str, Any], Any]

_ADDRESS = re.compile(r"auto|[^/\s]+:\d+")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,4})?", re.ASCII)


def _expect(*rules: tuple[str, Callable[[Any], bool]]) -> Check:
    """Return a check that names the first rule that a value breaks."""

    def check(name: str, value: Any) -> Any:
        for expected, holds in rules:
            if not holds(value):
                raise OptionError(f"{name} {value!r}: expected {expected}")
        return value

    return check


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def integer(least: int) -> Check:
    """Return a check for integers of at least `least`."""
    return _expect((f"an integer of at least {least}", lambda n: _is(n, int) and n >= least))


as_given = _expect()
boolean = _expect(("true or false", lambda value: isinstance(value, bool)))
number = _expect(("a number", lambda value: _is(value, int | float)))
_NOT_NEGATIVE = "a number of at least 0"
bound = _expect((_NOT_NEGATIVE, lambda value: _is(value, int | float) and value >= 0))
_FINITE = (_NOT_NEGATIVE, lambda value: _is(value, int | float) and 0 <= value < float("inf"))
finite = _expect(_FINITE)
share = _expect(_FINITE, ("a share at most 1", lambda value: value <= 1))
share_below_one = _expect(_FINITE, ("a share below 1", lambda value: value < 1))
address = _expect(("host:port or auto", lambda value: bool(_ADDRESS.fullmatch(str(value)))))
device = _expect(("auto, cpu, cuda or cuda:N", lambda value: bool(_DEVICE.fullmatch(str(value)))))
_is_path = _expect(("a path", lambda value: isinstance(value, str | os.PathLike)))


def path(name: str, value: Any) -> str:
    """Return a path as text."""
    return os.fspath(_is_path(name, value))


def globs(_name: str, value: Any) -> tuple[str, ...]:
    """Return one glob or several as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def nm_patterns(name: str, value: Any) -> tuple[NM, ...]:
    """Return one N:M pattern or several as a tuple, each once; of those that keep all, none."""
    given = [value] if isinstance(value, str | NM) else list(value or ())
    found = [parse_sparsity(each) for each in given]
    for each in found:
        if not isinstance(each, NM) or each.n == each.m:
            raise OptionError(f"{name} {each}: expected N:M with N below M, such as 2:4")
    return tuple(dict.fromkeys(each for each in found if isinstance(each, NM)))


def one_of(choices: tuple[str, ...]) -> Check:
    """Return a check for one of a few words."""

    def check(name: str, value: Any) -> Any:
        if value not in choices:
            raise OptionError(f"{name} {value!r} is unknown: choose from {', '.join(choices)}")
        return value

    return check


def parse_bytes(size: int | str | None) -> int | None:
    """Read `2GB`, `500MB`, `64KiB` or a number of bytes.

    Raises:
        OptionError: it is none of these.
    """
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0):
        return size
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", str(size).upper())
    number = int(float(found[1]) * units[found[2] or ""]) if found else 0
    if number < 1:
        raise OptionError(f"memory_budget {size!r}: expected a size such as 2GB or 500MB")
    return number


def seconds(name: str, time: Any) -> float:
    """Read `90s`, `20min`, `1.5h` or a number of seconds.

    Raises:
        OptionError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|)", str(time))
    number = float(found[1]) * {"": 1, "s": 1, "min": 60, "h": 3600}[found[2]] if found else 0.0
    if isinstance(time, bool) or number <= 0:
        raise OptionError(f"{name} {time!r}: expected a time such as 90s, 20min or 1.5h")
    return number


def require_known(options: Mapping[str, Any], known: list[str], what: str) -> None:
    """Raise an OptionError that names the nearest known option for one that is not."""
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise OptionError(f"{what} {name!r} is unknown: {hint}")
