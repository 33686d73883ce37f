"""What every experiment shares: runs become lines, and lines alone become tables and figures.

An experiment is a file of this folder with a name `EXPERIMENT`. A run adds one line of JSON to
`results/NAME.jsonl` as it ends and is not repeated while that line stands there: what was
interrupted goes on where it was. With `--quick` runs are few and small, their lines go to
`build/experiments`, and nothing is written into the docs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs/experiments.md"
sys.path[:0] = [str(HERE.parent), str(ROOT / "examples")]

Line = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What runs may ask for: `quick` ones, the folders of shared data and of exported models."""

    quick: bool
    shared: Path
    made: Path = ROOT / "build/models"


@dataclass(frozen=True)
class Run:
    """One measurement: `key` names it among the lines, `measure` returns the rest of its line."""

    key: Line
    measure: Callable[[], Line]


@dataclass(frozen=True)
class Finding:
    """Whether a claim holds here: `yes`, `no`, `in part`, or `unclear`, and what was measured."""

    ours: str
    agrees: str


@dataclass(frozen=True)
class Claim:
    """What a paper says, in our words; `judge` reads the lines, and returns None without them."""

    paper: str
    text: str
    judge: Callable[[Sequence[Line]], Finding | None]


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        name: of its file and of its results.
        title: of its part of the page.
        claims: it tests.
        runs: in the order in which they are made.
        draw: returns the lines of Markdown of its part, and writes its figures into the folder.
    """

    name: str
    title: str
    claims: Sequence[Claim]
    runs: Callable[[Settings], Iterable[Run]]
    draw: Callable[[Sequence[Line], Path], list[str]]

    @property
    def results(self) -> Path:
        """The lines that the page is made of."""
        return HERE / "results" / f"{self.name}.jsonl"


def read(path: Path) -> list[Line]:
    """Return the lines of a file of results; none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def perform(experiment: Experiment, settings: Settings, results: Path) -> list[Line]:
    """Make the runs that are not in `results` yet; return all its lines."""
    lines = read(results)
    results.parent.mkdir(parents=True, exist_ok=True)
    for run in experiment.runs(settings):
        if any(run.key.items() <= line.items() for line in lines):
            continue
        started = time.process_time()
        line = {**run.key, **run.measure()}
        line["cpu_seconds"] = round(time.process_time() - started, 1)
        with results.open("a", encoding="utf8") as file:
            file.write(json.dumps(line) + "\n")
        print(experiment.name, json.dumps(line)[:400], flush=True)
        lines.append(line)
    return lines


def render(experiments: Sequence[Experiment]) -> None:
    """Write the table of claims and every experiment's part into the page, from lines alone."""
    rows = ["| seed | claim | here | agrees | command |", "|---|---|---|---|---|"]
    for experiment in experiments:
        lines = read(experiment.results)
        for claim in experiment.claims:
            found = claim.judge(lines) or Finding("not run", "")
            command = f"`python benchmarks/experiments/{experiment.name}.py`"
            cells = [claim.paper, claim.text, found.ours, found.agrees, command]
            rows.append("| " + " | ".join(cells) + " |")
        if lines:
            _replace(experiment.name, experiment.draw(lines, PAGE.parent / "img"))
    _replace("claims", rows)


def _replace(name: str, parts: Sequence[str]) -> None:
    """Put lines between the marks of the page; a part without marks is added at its end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = PAGE.read_text(encoding="utf8")
    if begin not in text:
        text += f"\n{begin}\n{end}\n"
    block = "\n".join([begin, "", *parts, "", end])
    found = re.compile(re.escape(begin) + ".*" + re.escape(end), re.DOTALL)
    PAGE.write_text(found.sub(lambda _: block, text), encoding="utf8")


def main(*experiments: Experiment) -> None:
    """Run experiments from the command line."""
    parser = argparse.ArgumentParser(description="Run experiments, and draw their results.")
    if len(experiments) > 1:
        parser.add_argument("names", nargs="*", metavar="NAME", help="these only (default: all)")
    parser.add_argument("--quick", action="store_true", help="minutes; the docs stay as they are")
    parser.add_argument("--render", action="store_true", help="run nothing, draw what was run")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", metavar="DIR")
    arguments = parser.parse_args()
    settings = Settings(arguments.quick, arguments.shared)
    names = getattr(arguments, "names", None) or [item.name for item in experiments]
    if unknown := set(names) - {item.name for item in experiments}:
        parser.error(f"experiment {min(unknown)!r} is unknown")
    for experiment in experiments:
        if experiment.name not in names or arguments.render:
            continue
        quick = ROOT / "build/experiments" / f"{experiment.name}.jsonl"
        if arguments.quick:
            quick.unlink(missing_ok=True)
        perform(experiment, settings, quick if arguments.quick else experiment.results)
    if not arguments.quick:
        render(experiments if len(experiments) > 1 else everything())


def everything() -> list[Experiment]:
    """Return every experiment of this folder, in the order of their names."""
    names = sorted({path.stem for path in HERE.glob("*.py")} - {"lab", "__main__"})
    return [importlib.import_module(name).EXPERIMENT for name in names]
