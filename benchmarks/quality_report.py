"""Tables and plots from the results of `model_quality.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]

_MARKS = "<!-- model_quality{}: begin -->", "<!-- model_quality{}: end -->"
# The columns of the short table.
_SHORT = ("dense", "magnitude", "wanda", "sparsegpt", "alps", "defaults")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the results; none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def key(line: Line) -> tuple[Any, ...]:
    """Return what makes a run the same run."""
    return tuple(line[name] for name in ("task", "method", "pattern", "preset", "count"))


def render(results: Path, methods: Sequence[str], docs: Path) -> None:
    """Write the tables and plots of the results.

    All go between the marks in `docs/benchmarks-notebook.md`, with the plots in `docs/img`; a
    short table between those in `docs/benchmarks.md`.
    """
    lines = read(results)
    parts = []
    for task in dict.fromkeys(line["task"] for line in lines):
        own = [line for line in lines if line["task"] == task]
        image = docs / "img" / f"quality-{task}.png"
        plotted = _plot(own, methods, image)
        parts += [f"### {task}", "", f"{own[0]['title']}.", "", *_table(own, methods), ""]
        parts += [f"![{task}: metric against method](img/{image.name})", ""] if plotted else []
        image = docs / "img" / f"quality-{task}-rounds.png"
        plotted = _plot_rounds(own, image)
        parts += [f"![{task}: metric against rounds](img/{image.name})", ""] if plotted else []
    _replace(docs / "benchmarks-notebook.md", "", parts)
    _replace(docs / "benchmarks.md", " in short", [*_short_table(lines), ""])


def _replace(page: Path, which: str, parts: Sequence[str]) -> None:
    """Put lines between the marks of a page."""
    begin, end = (mark.format(which) for mark in _MARKS)
    text = page.read_text(encoding="utf8")
    found = re.compile(re.escape(begin) + ".*" + re.escape(end), re.DOTALL)
    if not found.search(text):
        raise SystemExit(f"{page} lacks the marks {begin} and {end}")
    block = "\n".join([begin, "", *parts, end])
    page.write_text(found.sub(lambda _: block, text), encoding="utf8")


def _short_table(lines: Sequence[Line]) -> list[str]:
    """Return the first metric of each task, a row a pattern; the best of several is bold."""
    rows = [
        f"| model | metric | pattern | {' | '.join(_SHORT)} |",
        "|---" * (len(_SHORT) + 3) + "|",
    ]
    for task in dict.fromkeys(line["task"] for line in lines):
        own = [line for line in lines if line["task"] == task]
        usual = max((line["count"] for line in own if line["method"] == "sparsegpt"), default=0)
        metric, how = next(iter(own[0]["metric_formats"].items()))
        dense = next(line for line in own if line["method"] == "dense")
        for pattern in _patterns(own):
            # Of two presets the slower one, which is what is usual.
            runs = sorted(own, key=lambda line: line["preset"] != "fast")
            found = {x["method"]: x for x in runs if (x["pattern"], x["count"]) == (pattern, usual)}
            values = {n: found[n]["metrics"][metric] for n in _SHORT if n in found}
            best = (min if own[0]["falls"] else max)(values.values()) if len(values) > 1 else None
            cells = [f"{dense['metrics'][metric]:{how}}"]
            for name in _SHORT[1:]:
                cell = f"{values[name]:{how}}" if name in values else ""
                cell = f"**{cell}**" if cell and values[name] == best else cell
                note = ", fast" if cell and found[name]["preset"] == "fast" else ""
                cells.append(cell + note)
            head = own[0]["title"].split(",")[0], metric, _percent(pattern)
            rows.append("| " + " | ".join([*head, *cells]) + " |")
    return rows


def _label(line: Line) -> str:
    notes = [line["preset"]] if line["preset"] not in (None, "balanced") else []
    return ", ".join([line["method"], *notes])


def _order(own: Sequence[Line], methods: Sequence[str]) -> list[tuple[str, int]]:
    """Return the rows that occur, as label and calibration count, the dense model first."""
    rank = {name: place for place, name in enumerate(["dense", *methods])}
    rows = {(_label(line), line["count"]): rank[line["method"]] for line in own}
    return sorted(rows, key=lambda row: (row[1], rows[row]))


def _table(own: Sequence[Line], methods: Sequence[str]) -> list[str]:
    formats = own[0]["metric_formats"]
    patterns = _patterns(own)
    cells = {(_label(line), line["count"], line["pattern"]): line for line in own}
    usual = max((line["count"] for line in own if line["method"] == "sparsegpt"), default=0)

    def written(line: Line | None) -> str:
        if line is None:
            return ""
        return " / ".join(f"{line['metrics'][name]:{how}}" for name, how in formats.items())

    head = f"| {' / '.join(formats)} | " + " | ".join(_percent(pattern) for pattern in patterns)
    rows = [head + " |", "|---" * (len(patterns) + 1) + "|"]
    for label, count in _order(own, methods):
        if label == "dense":
            found = [written(cells[label, count, ""])] * len(patterns)
        else:
            found = [written(cells.get((label, count, pattern))) for pattern in patterns]
        shown = label if count in (0, usual) else f"{label}, {count:,} for calibration"
        rows.append(f"| {shown} | " + " | ".join(found) + " |")
    return rows


def _patterns(own: Sequence[Line]) -> list[str]:
    """Return the patterns that occur, N:M first."""
    return sorted({line["pattern"] for line in own} - {""}, key=lambda p: (":" not in p, p))


def _percent(pattern: str) -> str:
    return pattern if ":" in pattern else f"{float(pattern):.0%}"


def _plot(own: Sequence[Line], methods: Sequence[str], path: Path) -> bool:
    """Draw the first metric against the method, a line a pattern; False without enough runs."""
    from matplotlib.figure import Figure

    metric = next(iter(own[0]["metric_formats"]))
    usual = max((line["count"] for line in own if line["method"] == "sparsegpt"), default=0)
    runs = [line for line in own if line["count"] == usual and line["preset"] != "fast"]
    drawn_here = [name for name in methods if " rounds" not in name]
    names = [name for name in drawn_here if any(line["method"] == name for line in runs)]
    if len(names) < 3:
        return False
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for pattern in _patterns(runs):
        values = {x["method"]: x["metrics"][metric] for x in runs if x["pattern"] == pattern}
        shown = [name for name in names if name in values]
        places = [names.index(name) for name in shown]
        heights = [values[name] for name in shown]
        (drawn,) = axes.plot(places, heights, "o-", label=_percent(pattern))
        best = (min if own[0]["falls"] else max)(range(len(shown)), key=heights.__getitem__)
        axes.plot(places[best], heights[best], "*", markersize=16, color=drawn.get_color())
    dense = next(line for line in own if line["method"] == "dense")
    axes.axhline(dense["metrics"][metric], color="0.5", linestyle="--", label="dense")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_ylabel(metric)
    axes.set_title(own[0]["title"].split(",")[0])
    if own[0]["falls"]:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


def _plot_rounds(own: Sequence[Line], path: Path) -> bool:
    """Draw the first metric against the number of rounds, a line a pattern; False without runs."""
    from matplotlib.figure import Figure

    metric = next(iter(own[0]["metric_formats"]))
    usual = max((line["count"] for line in own if line["method"] == "sparsegpt"), default=0)
    curves: dict[str, dict[int, float]] = {}
    for line in own:
        found = re.fullmatch(r"defaults(?:, (\d+) rounds)?", line["method"])
        if found and line["count"] == usual and line["preset"] == "balanced":
            curve = curves.setdefault(line["pattern"], {})
            curve[int(found[1] or 1)] = line["metrics"][metric]
    curves = {pattern: curve for pattern, curve in curves.items() if len(curve) > 2}
    if not curves:
        return False
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for pattern, curve in curves.items():
        rounds = sorted(curve)
        heights = [curve[count] for count in rounds]
        (drawn,) = axes.plot(rounds, heights, "o-", label=_percent(pattern))
        best = (min if own[0]["falls"] else max)(rounds, key=curve.__getitem__)
        axes.plot(best, curve[best], "*", markersize=16, color=drawn.get_color())
    axes.set_xticks(range(1, 1 + max(max(curve) for curve in curves.values())))
    axes.set_xlabel("rounds, on as many parts of the same data")
    axes.set_ylabel(metric)
    axes.set_title(own[0]["title"].split(",")[0])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    return True
