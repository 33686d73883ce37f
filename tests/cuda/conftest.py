"""An emulated GPU; see `emulation.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from emulation import Gpu, emulated  # noqa: E402


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with emulated(Gpu(index=1)) as found:
        yield found


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two blocks of Llama's shape, small."""
    monkeypatch.syspath_prepend(str(HERE.parents[1] / "benchmarks"))
    import scale

    sizes = {"HIDDEN": 64, "FEED_FORWARD": 176, "HEADS": 4, "VOCABULARY": 256, "SEQUENCE": 16}
    for name, size in sizes.items():
        monkeypatch.setattr(scale, name, size)
    path = tmp_path / "llama.onnx"
    scale.write_model(path, 2)
    return path
