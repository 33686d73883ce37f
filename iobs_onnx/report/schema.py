"""The schema of `report.json`: its version, and how a file is read back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from iobs_onnx.errors import OptionError

SCHEMA_VERSION = 1
_PARTS: dict[str, type] = {
    "model": dict,
    "output": dict,
    "versions": dict,
    "runtime": dict,
    "options": dict,
    "calibration": dict,
    "sites": list,
    "declined": list,
    "totals": dict,
    "verification": list,
    "seconds": dict,
    "deployment": dict,
}


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the report in a file that `iobs-onnx prune --report-dir` wrote.

    Raises:
        OptionError: the file cannot be read or holds no report of a known schema.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"report {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"report {path}: not JSON: {error}") from error
    version = report.get("schema_version") if isinstance(report, dict) else None
    if version != SCHEMA_VERSION:
        raise OptionError(
            f"report {path}: schema_version {version!r}; this version of iobs-onnx reads "
            f"{SCHEMA_VERSION}, as `iobs-onnx prune --report-dir` writes it"
        )
    for name, kind in _PARTS.items():
        if not isinstance(report.get(name), kind):
            raise OptionError(f"report {path}: {name!r} is missing or not of type {kind.__name__}")
    return dict(report)
