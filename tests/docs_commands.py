"""The commands in the docs, run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def commands(page: str) -> list[str]:
    """Return the fenced `bash` blocks of a page."""
    return re.findall(r"^```bash\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)


def programs(page: str) -> list[str]:
    """Return the fenced `python` blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)


def run(block: str, folder: Path) -> str:
    """Run a block with this environment's commands first; return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def run_python(program: str, folder: Path) -> str:
    """Run a program with this environment's Python; return what it printed."""
    (folder / "from_docs.py").write_text(program)
    return run("python from_docs.py", folder)
