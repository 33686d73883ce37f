"""What every kind of model needs: its file, its data, a use for what is pruned."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Made:
    """A dense model in a folder of its own.

    Attributes:
        model: the file that the exporter wrote.
        data: options that name the calibration data, as `iobs-onnx prune` takes them.
        use: runs a sparse file in the model's own runtime, and asserts.
        folder: whether the model is used as a folder, with all that lies beside it.
    """

    model: Path
    data: Sequence[str]
    use: Callable[[Path], None]
    folder: bool = False


def packaged(name: str) -> Path:
    """Return the folder of a package that is not imported; skip where it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {name} is not installed: docs/kinds.md says where it comes from")
    return Path(spec.origin).parent


def export(
    module: Any,
    example: Mapping[str, Any],
    path: Path,
    output: str,
    axes: Mapping[str, Mapping[int, str]],
    *,
    dynamo: bool,
) -> Path:
    """Export one output of a torch module, with the arguments of `example`, some axes free."""
    import torch

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            made = self.module(**dict(zip(example, given, strict=True)))
            return getattr(made, output, made)

    path.parent.mkdir(parents=True, exist_ok=True)
    dims = {name: torch.export.Dim(name) for found in axes.values() for name in found.values()}
    shapes = [{at: dims[free] for at, free in axes.get(name, {}).items()} for name in example]
    free: dict[str, Any] = {"dynamic_axes": axes, "opset_version": 17}
    if dynamo:
        free = {"dynamic_shapes": (tuple(shapes),), "external_data": False, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        torch.onnx.export(
            Wrapped().eval(),
            tuple(example.values()),
            path,
            input_names=[*example],
            output_names=[output],
            dynamo=dynamo,
            **free,
        )
    return path


def session(model: Path) -> ort.InferenceSession:
    """Open a model on the CPU; warnings about its graph are the exporter's."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def outputs_of(model: Path, feeds: Sequence[Feed]) -> list[np.ndarray]:
    """Return the first output for each feed."""
    running = session(model)
    return [running.run(None, dict(feed))[0] for feed in feeds]


def stays_near(dense: Path, feeds: Sequence[Feed], bound: float) -> Callable[[Path], None]:
    """Return a use: outputs differ from the dense ones, relative to these, by less than `bound`."""

    def use(sparse: Path) -> None:
        apart = size = 0.0
        for a, b in zip(outputs_of(dense, feeds), outputs_of(sparse, feeds), strict=True):
            assert a.shape == b.shape
            assert np.isfinite(b).all()
            apart += float(((a - b).astype(float) ** 2).sum())
            size += float((a.astype(float) ** 2).sum())
        assert 0 < (apart / size) ** 0.5 < bound

    return use


def save_feeds(folder: Path, feeds: Sequence[Feed]) -> list[str]:
    """Write feeds as a directory of `.npz`; return the option that names it."""
    folder.mkdir()
    for at, feed in enumerate(feeds):
        np.savez(folder / f"{at:03d}.npz", **feed)
    return ["--calibration", str(folder)]
