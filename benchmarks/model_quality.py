"""What pruning costs whole models, by the metric of their task: methods, patterns, real models.

    python benchmarks/model_quality.py minilm stories15m --patterns 2:4 0.5 --shared ../shared
    python benchmarks/model_quality.py --render

Every run adds a line to the results as it ends, and is not repeated while it stands there: an
interrupted benchmark goes on where it was. `--render` writes the short table of docs/benchmarks.md,
the tables of docs/benchmarks-notebook.md ("Whole models") and the plots from the results. Models
and data lie in the folder `--shared`; what is exported is kept in build/models.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import quality_report
from quality_tasks import TASKS, Task

import iobs_onnx

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("model_quality.jsonl")
PATTERNS = ("2:4", "0.5", "0.6", "0.7")

# No step but the solver's: neither targets, nor biases, nor other calibration than the task's.
_PLAIN = {"target": "layer", "bias_compensation": 0.0, "random_tokens": 0.0}
_ONE_SHOT = {**_PLAIN, "sequential": "none"}
_INPUTS = {**_PLAIN, "sequential": "site"}
_DENSE = {**_INPUTS, "target": "dense", "learning_rate": 1.0, "residual": False}

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"solver": "magnitude", **_ONE_SHOT},
    "wanda": {"solver": "wanda", **_INPUTS},
    "sparsegpt": {"solver": "sparsegpt", **_INPUTS},
    "alps": {"solver": "alps", **_INPUTS},
    "iobs one-shot": _ONE_SHOT,
    "iobs pruned inputs": _INPUTS,
    "iobs dense target": _DENSE,
    "iobs dense target, residual": {**_DENSE, "residual": True},
    "defaults": {},
    **{f"defaults, {count} rounds": {"rounds": count} for count in (2, 3, 4, 5)},
    "defaults, 5 rounds, none forgotten": {"rounds": 5, "forgetting_factor": 1.0},
    "defaults, allocated": {"allocate": "error"},
    "defaults, allocated by loss": {"allocate": "loss"},
    "defaults, and own text": {"calibration": "self"},
    # Wu et al., NeurIPS 2024, section 5: small symmetric steps, projected by SparseGPT.
    "paper's 5 rounds": {"solver": "sparsegpt", "rounds": 5, "learning_rate": 0.01, **_INPUTS},
}


def means_nothing(options: Mapping[str, Any], pattern: str, task: Task) -> bool:
    """Whether options do not go with a pattern, or a model."""
    shared_out = "allocate" in options and ":" in pattern
    return shared_out or ("calibration" in options and task.writes is None)


def run(task: Task, options: Mapping[str, Any], pattern: str, count: int) -> dict[str, Any]:
    """Prune once and judge; return what a line of the results holds besides its key."""
    options, calibration = dict(options), [task.calibration(count)]
    if own := options.pop("calibration", None):
        calibration.append(own)
        options |= task.writes or {}
    with tempfile.TemporaryDirectory(prefix="model-quality-") as folder:
        output = Path(folder) / "sparse.onnx"
        started = time.perf_counter()
        result = iobs_onnx.prune(
            task.model,
            calibration=calibration if own else calibration[0],
            sparsity=pattern,
            output=output,
            **options,
        )
        seconds = time.perf_counter() - started
        totals = result.report.totals
        return {
            "metrics": task.judge(output),
            "seconds": round(seconds, 1),
            "sites": totals["sites"],
            "sparsity": totals["sparsity"],
            "layer_error": totals["layer_error_geomean"],
            "rounds": [[item.error, item.best] for item in result.report.rounds],
        }


def main() -> None:
    """Run what is asked for and not yet in the results, or render them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--preset", default="balanced", choices=("fast", "balanced", "best"))
    parser.add_argument("--count", type=int, help="texts, sequences or images that calibrate")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", metavar="DIR")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="write the tables and the plots")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.tasks if name not in TASKS]:
        parser.error(f"task {unknown[0]!r} is unknown: choose from {', '.join(TASKS)}")
    for name in arguments.tasks:
        _run_task(name, arguments)
    if arguments.render:
        quality_report.render(arguments.results, list(METHODS), ROOT / "docs")


def _run_task(name: str, arguments: argparse.Namespace) -> None:
    task = TASKS[name](ROOT / "build/models", arguments.shared)
    done = {quality_report.key(line) for line in quality_report.read(arguments.results)}
    count = arguments.count or task.count
    common = {
        "task": name,
        "title": task.title,
        "metric_formats": dict(task.metrics),
        "falls": task.falls,
    }
    dense = {**common, "method": "dense", "pattern": "", "preset": None, "count": 0}
    if quality_report.key(dense) not in done:
        _append(arguments.results, {**dense, "metrics": task.judge(task.model)})
    for pattern in arguments.patterns:
        for method in arguments.methods:
            options = METHODS[method]
            if means_nothing(options, pattern, task):
                continue
            preset = None if "solver" in options else arguments.preset
            line = {**common, "method": method, "pattern": pattern}
            line |= {"preset": preset, "count": count}
            if quality_report.key(line) in done:
                continue
            _append(
                arguments.results,
                {**line, **run(task, {**options, "preset": preset}, pattern, count)},
            )


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf8") as file:
        file.write(json.dumps(line) + "\n")
    told = ", ".join(f"{name} {value:.4f}" for name, value in line["metrics"].items())
    seconds = f", {line['seconds']:.0f} s" if "seconds" in line else ""
    told = f"{line['pattern']} {line['method']} ({line['preset']}, {line['count']}): {told}"
    print(f"{line['task']} {told}{seconds}", flush=True)


if __name__ == "__main__":
    main()
