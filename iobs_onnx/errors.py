"""Everything that can go wrong, in one tree.

::

    IobsError                 anything this package raises on purpose
    ├── InputError            the caller's input is at fault; the command line exits with 2
    │   ├── ModelError        the ONNX file cannot be read, or the pass cannot serve it
    │   ├── DataError         calibration or evaluation feeds do not fit the model
    │   ├── OptionError       an option's value is malformed or contradicts another
    │   └── DependencyError   an optional package or execution provider is not there
    ├── SolverError           a layer could not be solved (names site, damping and remedy)
    ├── CheckError            a file this package wrote does not hold what it promises
    └── GateError             a bound that the caller set does not hold; exits with 4

Every message is one line that names the file, tensor or option at fault and the remedy.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class IobsError(Exception):
    """Base of every error raised on purpose by this package."""


class InputError(IobsError):
    """The caller's input is at fault."""


class ModelError(InputError):
    """The ONNX model cannot be read or cannot be served."""


class DataError(InputError):
    """Calibration or evaluation data do not fit the model."""


class OptionError(InputError):
    """An option's value is malformed or contradicts another option."""


class DependencyError(InputError):
    """An optional package or an execution provider is missing."""


class SolverError(IobsError):
    """A layer could not be solved; the algorithm is never changed in silence."""


class CheckError(IobsError):
    """A result does not hold what it promises; nothing was written."""


class GateError(IobsError):
    """A bound that the caller set on the result does not hold; nothing was written."""


@contextmanager
def silenced(logger: str) -> Iterator[None]:
    """Keep a library from logging faults that this package tells of in its own way."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
