"""Layer error and time of the solvers on real layers, relative to SparseGPT, paired in one run.

    python benchmarks/solvers.py [LAYERS.safetensors ...] [--patterns 2:4 0.7]
        [--json FILE] [--markdown FILE] [--plot FILE]

Each solver solves the same stacked layers one after the other; a round goes through all solvers
before the next begins, and the times are medians over rounds. LAYERS come from `layers.py`;
without any, those of all-MiniLM-L6-v2 are made. `--every 7` takes every seventh layer, for the slow
solvers: layers come in fours (attention in and out, feed-forward in and out), so that an odd step
meets all kinds. Layers that a pattern does not fit are left out, and the number of sites says so.
With the JSON files of earlier runs in place of LAYERS those are shown again, as one.

A solver written with `+bias` leaves the mean of the error to the layer's bias: it works on, and is
judged by, `H − μμᵀ` with `μ` the mean of the inputs. It is meant for layers that have a bias.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path

import layers as storage
import torch
from rich.console import Console
from rich.table import Table

from iobs_onnx.layer import Solution, solve_stacked
from iobs_onnx.solvers import PRESETS, SOLVERS, make_solver
from iobs_onnx.sparsity import Pattern, parse_sparsity

DAMPING = 0.01
# A preset is written behind a colon.
NAMES = [*(name for name in SOLVERS if name != "iobs"), *(f"iobs:{name}" for name in PRESETS)]
BIAS = "+bias"

Row = dict[str, float]
# The rows of every solver, pattern and file.
Results = dict[str, dict[str, dict[str, Row]]]


def solve_all(
    layers: list[storage.Layer], solver: str, pattern: Pattern
) -> tuple[list[Solution[torch.Tensor]], float]:
    """Return the solution of every site and the seconds for all."""
    solutions: list[Solution[torch.Tensor]] = []
    if solver.endswith(BIAS):
        layers = [replace(layer, hessian=layer.centred) for layer in layers]
    started = time.perf_counter()
    for layer in layers:
        solutions += solve_stacked(
            layer.weights,
            layer.hessian,
            pattern=pattern,
            solver=make_solver(*solver.removesuffix(BIAS).split(":")),
            damping=DAMPING,
        )
    return solutions, time.perf_counter() - started


def compare(
    layers: list[storage.Layer], solvers: list[str], pattern: Pattern, rounds: int
) -> dict[str, Row]:
    """Return each solver's error and time, absolute and as a multiple of SparseGPT's."""
    excesses: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {solver: [] for solver in solvers}
    solve_all(layers[:1], "sparsegpt", pattern)  # the first calls load libraries
    for _ in range(rounds):
        for solver in solvers:
            solutions, spent = solve_all(layers, solver, pattern)
            excesses[solver] = [solution.excess for solution in solutions]
            if solver == "sparsegpt":
                energies = [solution.energy for solution in solutions]
            seconds[solver].append(spent)
    base_seconds = seconds["sparsegpt"]
    results = {}
    for solver, excess in excesses.items():
        ratios = _ratios(excess, excesses["sparsegpt"])
        results[solver] = {
            "sites": len(ratios),
            "error": geomean(_ratios(excess, energies)),
            "error_ratio": geomean(ratios),
            "worst_ratio": max(ratios),
            "seconds": statistics.median(seconds[solver]),
            "time_ratio": statistics.median(_ratios(seconds[solver], base_seconds)),
        }
    return results


def _ratios(values: list[float], others: list[float]) -> list[float]:
    return [value / other for value, other in zip(values, others, strict=True)]


def geomean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def measure(
    files: list[Path], patterns: list[str], solvers: list[str], every: int, rounds: int
) -> Results:
    """Return the rows of every solver, pattern and file."""
    results: Results = {}
    for file in files:
        layers = storage.read(file)
        for text in patterns:
            pattern = parse_sparsity(text)
            fitting = [layer for layer in layers if not pattern.misfit(len(layer.hessian))]
            found = compare(fitting[::every], solvers, pattern, rounds)
            results.setdefault(file.stem, {})[text] = found
            show(f"{file.stem}, {found['sparsegpt']['sites']} sites, {text}", found)
    return results


def merged(runs: list[Results]) -> Results:
    """Return the rows of several runs; of a row that occurs twice the last one."""
    results: Results = {}
    for run in runs:
        for name, patterns in run.items():
            for pattern, found in patterns.items():
                results.setdefault(name, {}).setdefault(pattern, {}).update(found)
    return results


def main() -> None:
    """Run the benchmark and print a table for each file and pattern."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layers", nargs="*", type=Path, metavar="LAYERS")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.7"])
    choices = [*NAMES, *(name + BIAS for name in NAMES)]
    parser.add_argument("--solvers", nargs="+", default=NAMES, choices=choices, metavar="NAME")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take each Nth layer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures")
    parser.add_argument("--markdown", type=Path, help="write a table for each file")
    parser.add_argument("--plot", type=Path, help="draw error against time (.svg, .png)")
    arguments = parser.parse_args()
    files = arguments.layers or [storage.DEFAULT_LAYERS]
    if not arguments.layers and not files[0].exists():
        model, calibration = storage.minilm()
        storage.capture(model, str(calibration), files[0])
    if files[0].suffix == ".json":
        results = merged([json.loads(file.read_text()) for file in files])
    else:
        solvers = ["sparsegpt", *(name for name in arguments.solvers if name != "sparsegpt")]
        every, rounds = arguments.every, arguments.rounds
        results = measure(files, arguments.patterns, solvers, every, rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text("\n".join(markdown(*item) for item in results.items()))
    if arguments.plot:
        plot(results, arguments.plot)


def show(title: str, found: dict[str, Row]) -> None:
    """Print one table."""
    table = Table(title=title)
    table.add_column("solver", no_wrap=True)
    for heading in ("error", "÷ sparsegpt", "worst", "seconds", "× sparsegpt"):
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


def markdown(name: str, patterns: dict[str, dict[str, Row]]) -> str:
    """Return one file's table: error and, in parentheses, time, both relative to SparseGPT."""
    # Of each solver the row of the first pattern it was run at.
    rows = {name: row for found in reversed(patterns.values()) for name, row in found.items()}
    count = rows["sparsegpt"]["sites"]
    lines = [
        f"| {name}, {count} sites | " + " | ".join(patterns) + " |",
        "|---" * (1 + len(patterns)) + "|",
    ]
    for solver in sorted(rows, key=lambda solver: -rows[solver]["error_ratio"]):
        cells = (found.get(solver) for found in patterns.values())
        lines.append(f"| {solver} | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    return f"{row['error_ratio']:.3f} ({row['time_ratio']:.2g})" if row else ""


def plot(results: Results, path: Path) -> None:
    """Draw error against time, a row of panels for each file and a column for each pattern."""
    import matplotlib as mpl

    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "solvers"  # the same file for the same figures
    from matplotlib import pyplot as plt

    columns = max(map(len, results.values()))
    size = (2.5 * columns, 2.4 * len(results) + 0.8)
    figure, axes = plt.subplots(len(results), columns, figsize=size, squeeze=False, sharex="row")
    markers = dict(zip(NAMES, "v^<>sPXDohp*", strict=False))
    for line, (name, patterns) in zip(axes, results.items(), strict=True):
        for panel in line[len(patterns) :]:
            panel.set_axis_off()
        for panel, (pattern, found) in zip(line, patterns.items(), strict=False):
            for number, solver in enumerate(NAMES):
                if solver in found:
                    point = found[solver]["time_ratio"], found[solver]["error_ratio"]
                    panel.loglog(*point, markers[solver], color=f"C{number % 10}", label=solver)
            panel.set_title(f"{name}, {pattern}", fontsize=8)
            panel.tick_params(labelsize=7, which="both")
            panel.grid(alpha=0.3, which="both")
    figure.supxlabel("time, multiple of SparseGPT's", fontsize=9)
    figure.supylabel("layer error, multiple of SparseGPT's", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, fontsize=8)
    figure.set_layout_engine("constrained")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
