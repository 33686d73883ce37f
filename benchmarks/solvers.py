"""Layer error and time of the solvers on real layers, relative to SparseGPT, paired in one run.

    python benchmarks/solvers.py [LAYERS.safetensors ...] [--patterns 2:4 0.7]
        [--json FILE] [--markdown FILE] [--plot FILE]

Each solver solves the same stacked layers one after the other; a round goes through all solvers
before the next begins, and the times are medians over rounds. LAYERS come from `layers.py`;
without any, those of all-MiniLM-L6-v2 are made. `--every 7` takes every seventh layer, for the slow
solvers: layers come in fours (attention in and out, feed-forward in and out), so that an odd step
meets all kinds. Layers that a pattern does not fit are left out, and the number of sites says so.
With the JSON of an earlier run in place of LAYERS that is shown again.
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

Row = dict[str, float]


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
) -> dict[str, Row]:
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
            "sites": len(ratios),
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


def measure(
    files: list[Path], patterns: list[str], solvers: list[str], every: int, rounds: int
) -> dict[str, dict[str, dict[str, Row]]]:
    """Return the rows of every solver, pattern and file."""
    results: dict[str, dict[str, dict[str, Row]]] = {}
    for file in files:
        layers = storage.read(file)
        for text in patterns:
            pattern = parse_sparsity(text)
            fitting = [layer for layer in layers if not pattern.misfit(len(layer.hessian))]
            found = compare(fitting[::every], solvers, pattern, rounds)
            results.setdefault(file.stem, {})[text] = found
            show(f"{file.stem}, {found['sparsegpt']['sites']} sites, {text}", found)
    return results


def main() -> None:
    """Run the benchmark and print a table for each file and pattern."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layers", nargs="*", type=Path, metavar="LAYERS")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.7"])
    parser.add_argument("--solvers", nargs="+", default=NAMES, choices=NAMES)
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
        results = json.loads(files[0].read_text())
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
    first = next(iter(patterns.values()))
    count = first["sparsegpt"]["sites"]
    lines = [
        f"| {name}, {count} sites | " + " | ".join(patterns) + " |",
        "|---" * (1 + len(patterns)) + "|",
    ]
    for solver in sorted(first, key=lambda solver: -first[solver]["error_ratio"]):
        cells = (found[solver] for found in patterns.values())
        texts = (f"{cell['error_ratio']:.3f} ({cell['time_ratio']:.2g})" for cell in cells)
        lines.append(f"| {solver} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict[str, dict[str, Row]]], path: Path) -> None:
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
