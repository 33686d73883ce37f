"""int8 after pruning against int8 within it, on whole models: layer error and the task's metric.

`python benchmarks/quantization.py` prunes an encoder and a language model to 2:4 twice, without
and with `quantize="int8"`, and prints a table. Afterwards means: the pruned weights rounded to the
nearest, on the same symmetric grid of each output. Only weights are rounded. Models and data lie
in the folder `--shared`; see `model_quality.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from quality_tasks import TASKS, Task

import iobs_onnx

ROOT = Path(__file__).resolve().parents[1]


def round_to_nearest(sparse: Path, rounded: Path) -> None:
    """Round every weight matrix of a sparse model to 255 values an output, in place of floats."""
    model = onnx.load(sparse)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for site in iobs_onnx.inspect(sparse).sites:
        tensor = stored[site.initializer]
        weight = numpy_helper.to_array(tensor)
        step = np.abs(weight).max(axis=site.axis, keepdims=True) / np.float32(127)
        step[step == 0] = 1
        values = (weight / step).round() * step
        tensor.CopyFrom(numpy_helper.from_array(values.astype(weight.dtype), tensor.name))
    onnx.save(model, rounded)


def measure(
    task: Task, options: Mapping[str, Any], count: int, folder: Path
) -> list[tuple[str, float | None]]:
    """Return layer errors and metrics in the order of the table; None where there is no error."""
    errors: dict[str, float | None] = {"dense": None}
    models = {"dense": task.model} | {
        kind: folder / f"{kind}.onnx" for kind in ("sparse", "after", "joint")
    }
    for kind, quantize in (("sparse", None), ("joint", "int8")):
        result = iobs_onnx.prune(
            task.model,
            calibration=task.calibration(count),
            sparsity="2:4",
            quantize=quantize,
            output=models[kind],
            **options,
        )
        totals = result.report.totals
        errors[kind] = totals["layer_error_geomean"]
        if quantize:
            errors["after"] = totals["nearest_error_geomean"]
            assert all(site.quantized == "int8" for site in result.report.sites)
            below = sum(s.layer_error < (s.nearest_error or 0.0) for s in result.report.sites)
            print(f"joint below nearest at {below} of {totals['sites']} sites", flush=True)
    round_to_nearest(models["sparse"], models["after"])
    name, form = next(iter(task.metrics.items()))
    return [(f"{task.judge(model)[name]:{form}}", errors[kind]) for kind, model in models.items()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", default=["minilm", "stories15m"], metavar="TASK")
    parser.add_argument("--preset", default="balanced", choices=("fast", "balanced", "best"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="texts or sequences that calibrate")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", metavar="DIR")
    arguments = parser.parse_args()
    print("| | dense | 2:4 | 2:4, int8 after | 2:4, int8 joint |\n|---|---|---|---|---|")
    for name in arguments.tasks:
        task = TASKS[name](ROOT / "build/models", arguments.shared)
        with tempfile.TemporaryDirectory(prefix="quantization-") as folder:
            options = {"preset": arguments.preset, "seed": arguments.seed}
            found = measure(task, options, arguments.count or task.count, Path(folder))
        metric = next(iter(task.metrics))
        print(f"| {name}: {metric} | " + " | ".join(value for value, _ in found) + " |")
        cells = ("" if error is None else f"{error:.5f}" for _, error in found)
        print(f"| {name}: layer error | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
