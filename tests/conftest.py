"""Real models and data that many tests share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]


@pytest.fixture(scope="session")
def minilm_model() -> Path:
    """The dense all-MiniLM-L6-v2, exported once and kept for the demo and later runs."""
    import minilm

    return minilm.export(ROOT / "build" / "models" / "all-MiniLM-L6-v2.onnx")


@pytest.fixture(scope="session")
def minilm_feeds() -> list[dict[str, np.ndarray]]:
    """96 docstrings in six padded feeds."""
    import minilm

    return minilm.feeds(minilm.docstrings(96))


@pytest.fixture(scope="session")
def magika_model() -> Path:
    """A convolutional classifier of file types, input `bytes` (N, 2048) int32."""
    (path,) = _packaged("magika").glob("models/*/model.onnx")
    return path


@pytest.fixture(scope="session")
def paddle_model() -> Path:
    """A text-direction classifier by Paddle2ONNX, input `x` (-1, 3, h, w), from PP-OCR v2."""
    return _packaged("rapidocr_onnxruntime") / "models" / "ch_ppocr_mobile_v2.0_cls_infer.onnx"


def _packaged(name: str) -> Path:
    """Return the folder of a package that carries models; it is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is listed in models.txt"
    assert spec.origin is not None
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Models and data that lie beside the checkout on some machines."""
    folder = ROOT.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip("the folder shared/ with further models is not beside the checkout")
    return folder
