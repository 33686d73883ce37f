"""Layer error and time of the solvers on real layers, relative to SparseGPT, paired in one run.

    python benchmarks/solvers.py [LAYERS.safetensors ...] [--patterns 2:4 0.7] [--json FILE]

Each solver solves the same stacked layers one after the other; a round goes through all solvers
before the next begins, and the times are medians over rounds. LAYERS come from `layers.py`;
without any, those of all-MiniLM-L6-v2 are made.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import layers as storage
from rich.console import Console
from rich.table import Table

from iobs_onnx.layer import solve_stacked
from iobs_onnx.solvers import PRESETS, SOLVERS, make_solver
from iobs_onnx.sparsity import Pattern, parse_sparsity

DAMPING = 0.01
# A preset is written behind a colon.
NAMES = [*(name for name in SOLVERS if name != "iobs"), *(f"iobs:{name}" for name in PRESETS)]


def solve_all(
    layers: list[storage.Layer], solver: str, pattern: Pattern
) -> tuple[list[float], float]:
    """Return the layer error of every site and the seconds for all."""
    errors: list[float] = []
    started = time.perf_counter()
    for layer in layers:
        solutions = solve_stacked(
            layer.weights,
            layer.hessian,
            pattern=pattern,
            solver=make_solver(*solver.split(":")),
            damping=DAMPING,
        )
        errors += [solution.layer_error for solution in solutions]
    return errors, time.perf_counter() - started


def compare(
    layers: list[storage.Layer], solvers: list[str], pattern: Pattern, rounds: int
) -> dict[str, dict[str, float]]:
    """Return each solver's error and time, absolute and as a multiple of SparseGPT's."""
    errors: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {solver: [] for solver in solvers}
    solve_all(layers[:1], "sparsegpt", pattern)  # the first calls load libraries
    for _ in range(rounds):
        for solver in solvers:
            errors[solver], spent = solve_all(layers, solver, pattern)
            seconds[solver].append(spent)
    base, base_seconds = errors["sparsegpt"], seconds["sparsegpt"]
    results = {}
    for solver in solvers:
        ratios = [mine / theirs for mine, theirs in zip(errors[solver], base, strict=True)]
        times = [a / b for a, b in zip(seconds[solver], base_seconds, strict=True)]
        results[solver] = {
            "error": geomean(errors[solver]),
            "error_ratio": geomean(ratios),
            "worst_ratio": max(ratios),
            "seconds": statistics.median(seconds[solver]),
            "time_ratio": statistics.median(times),
        }
    return results


def geomean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def main() -> None:
    """Run the benchmark and print a table for each file and pattern."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layers", nargs="*", type=Path, metavar="LAYERS")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.7"])
    parser.add_argument("--solvers", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    files = arguments.layers or [storage.DEFAULT_LAYERS]
    if not arguments.layers and not files[0].exists():
        model, calibration = storage.minilm()
        storage.capture(model, str(calibration), files[0])
    solvers = ["sparsegpt", *(name for name in arguments.solvers if name != "sparsegpt")]
    results = {}
    for file in files:
        layers = storage.read(file)
        for text in arguments.patterns:
            found = compare(layers, solvers, parse_sparsity(text), arguments.rounds)
            results[f"{file.stem} {text}"] = found
            show(f"{file.stem}, {sum(len(x.names) for x in layers)} sites, {text}", found)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def show(title: str, found: dict[str, dict[str, float]]) -> None:
    """Print one table."""
    table = Table(title=title)
    table.add_column("solver")
    for heading in ("layer error", "÷ sparsegpt", "worst site", "seconds", "× sparsegpt"):
        table.add_column(heading, justify="right")
    for solver, row in found.items():
        table.add_row(
            solver,
            f"{row['error']:.5f}",
            f"{row['error_ratio']:.4f}",
            f"{row['worst_ratio']:.3f}",
            f"{row['seconds']:.2f}",
            f"{row['time_ratio']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
