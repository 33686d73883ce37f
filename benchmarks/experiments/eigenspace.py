"""OBS on the dominant eigenspace of the Hessian: error, time and storage by its rank r.

Hassibi, Stork, Wolff, Watanabe ("Optimal Brain Surgeon: Extensions and Performance Comparisons",
NIPS 1993) keep the eigenvectors of the r largest eigenvalues, to store and to compute less. Here
that is tried on the widest linears of two language models, 1,536 inputs each: the first and the
last down projection of the feed-forward, of which `ROWS` outputs are solved.

Two forms choose what to remove: "dominant alone" knows of `H` no more than those eigenvectors, and
the damping, as we read the paper; "with the rest's diagonal" is `OBS(rank=r)`, which keeps the
diagonal of the remainder too. "diagonal" is r = 0. Every choice is refitted with the whole `H`, so
that errors differ by what is removed alone; they are judged by the whole `H`, and by that of other
text.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lab import Claim, Experiment, Finding, Line, Run, Settings, main
from quality_tasks import found

from iobs_onnx.errors import SolverError
from iobs_onnx.hessian import combine
from iobs_onnx.layer import absolute_damping
from iobs_onnx.passes import find_sites, instrument, load_model, stored_slots
from iobs_onnx.runtime import Store, Stream, calibrate, input_specs, open_data, open_session
from iobs_onnx.runtime.padding import find_padding
from iobs_onnx.solvers.obs import OBS
from iobs_onnx.solvers.problem import Problem
from iobs_onnx.solvers.quadratic import squared_norms
from iobs_onnx.solvers.refit import refitted
from iobs_onnx.sparsity import parse_sparsity

MODELS = ("MiniLM", "SmolLM2-135M")
PATTERNS = ("50%", "70%", "2:4")
RANKS = (1, 4, 16, 64, 192)
# The forms of the eigenspace, as a line names them.
FORMS = {"dominant": "dominant alone", "rest": "with the rest's diagonal"}
INPUTS = 1536
ROWS = 32
DAMPING = 0.01
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Layer:
    """Rows of a weight `(rows, in)`, the Hessian `(in, in)` of its inputs and of other text."""

    weight: torch.Tensor
    hessian: torch.Tensor
    other: torch.Tensor


def runs(settings: Settings) -> Iterator[Run]:
    """Models, layers, patterns; one run holds all ranks beside the whole Hessian."""
    for model in MODELS[:1] if settings.quick else MODELS:
        for place in ("first",) if settings.quick else ("first", "last"):
            for pattern in PATTERNS[-1:] if settings.quick else PATTERNS:
                key = {"model": model, "layer": place, "pattern": pattern}
                yield Run(key, partial(_measure, model, settings, place, pattern))


def _measure(model: str, settings: Settings, place: str, pattern: str) -> Line:
    layer = _layers(model, settings)[place]
    return compare(layer, pattern, RANKS[:2] if settings.quick else RANKS)


def compare(layer: Layer, pattern: str, ranks: Sequence[int]) -> Line:
    """Return errors and CPU seconds of the whole Hessian, its diagonal, and both forms by rank."""
    damping = absolute_damping(DAMPING, layer.hessian)
    rows = len(layer.weight)
    problem = Problem(layer.weight, layer.hessian, damping, parse_sparsity(pattern), (rows,))
    values, vectors = torch.linalg.eigh(layer.hessian)

    def judged(choose: Callable[[Problem], torch.Tensor]) -> Line:
        fresh = replace(problem)  # without the inverse that another one computed
        started = time.process_time()
        try:
            mask = choose(fresh)
        except SolverError as error:
            return {"refused": str(error)}
        seconds = time.process_time() - started
        change = refitted(problem, mask, TOLERANCE).weight - layer.weight
        error, other = (
            float(squared_norms(change, matrix).sum() / squared_norms(layer.weight, matrix).sum())
            for matrix in (layer.hessian, layer.other)
        )
        return {"error": error, "other": other, "seconds": round(seconds, 3)}

    def dominant(rank: int, given: Problem) -> torch.Tensor:
        kept = vectors[:, -rank:] * values[-rank:].clamp_min(0).sqrt()
        return OBS(rank).solve(replace(given, hessian=kept @ kept.T)).mask

    OBS(ranks[0]).solve(problem)  # the first calls load libraries
    line: Line = {
        "whole": judged(lambda given: OBS().solve(given).mask),
        "diagonal": judged(
            lambda given: given.project(given.weight.square() * given.damped.diagonal())
        ),
        "spectrum": {},
        **{form: {} for form in FORMS},
    }
    for rank in ranks:
        line["spectrum"][str(rank)] = float(values[-rank:].sum() / values.sum())
        line["dominant"][str(rank)] = judged(partial(dominant, rank))
        line["rest"][str(rank)] = judged(lambda given, rank=rank: OBS(rank).solve(given).mask)
    return line


@cache
def _layers(model: str, settings: Settings) -> dict[str, Layer]:
    """Return the first and the last of the widest linears."""
    path, feeds, others = (_minilm if model == "MiniLM" else _smollm2)(settings)
    dense = load_model(path)
    stored = stored_slots(dense)
    wide = [
        site
        for site in find_sites(dense).sites
        if site.to_matrices(stored[site.initializer].tensor.numpy()).shape[2] == INPUTS
    ]
    sites = {"first": wide[0], "last": wide[-1]}
    taps = [site.taps[0] for site in sites.values()]
    values = [tap.value for tap in taps]
    session = open_session(instrument(dense, values))
    hessians = []
    for data in (feeds, others):
        opened = open_data(data, input_specs(dense), holdout=0)
        with tempfile.TemporaryDirectory(prefix="eigenspace-") as folder:
            stream = Stream(opened.calibration, Store(Path(folder), 0), padding=find_padding(dense))
            hessians.append(calibrate(taps, stream.run(session, fetch=values)).hessians)
    layers = {}
    for place, site in sites.items():
        weight = torch.from_numpy(site.to_matrices(stored[site.initializer].tensor.numpy())[0])
        own, other = (combine([given[site.taps[0]]]).matrix[0] for given in hessians)
        rows = 8 if settings.quick else ROWS
        chosen = weight[:: len(weight) // rows][:rows].float().contiguous()
        layers[place] = Layer(chosen, own, other)
    return layers


def _minilm(settings: Settings) -> tuple[Path, Any, Any]:
    """Return the encoder, docstrings as feeds, and other docstrings."""
    import minilm

    texts, others = (128, 64) if settings.quick else (256, 128)
    drawn = minilm.docstrings(texts + others)
    path = minilm.export(settings.made / "all-MiniLM-L6-v2.onnx")
    return path, minilm.feeds(drawn[:texts]), minilm.feeds(drawn[texts:])


def _smollm2(settings: Settings) -> tuple[Path, Any, Any]:
    """Return the language model and sequences of WikiText-2, train and valid, as feeds."""
    import export_models

    folder = settings.shared / "data/wikitext2"
    feeds = []
    for name, count in (("train_5k_lines.txt", 8), ("valid.txt", 4)):
        ids = export_models.smollm2_tokens(
            found(folder / name), settings.made / f"smollm2-{name}.npy"
        )
        sequences = ids[: len(ids) // 512 * 512].reshape(-1, 1, 512)[:count]
        feeds.append([{"input_ids": sequence} for sequence in sequences])
    return export_models.smollm2(settings.made / "smollm2.onnx"), *feeds


def _ranks(lines: Sequence[Line]) -> list[str]:
    return list(lines[0]["spectrum"])


def _ratio(lines: Sequence[Line], form: str, rank: str, judge: str = "error") -> float:
    """Return the geometric mean of errors relative to the whole Hessian's; rank 0: diagonal."""
    own = [line["diagonal"] if rank == "0" else line[form][rank] for line in lines]
    logs = [
        math.log(cell[judge] / line["whole"][judge])
        for cell, line in zip(own, lines, strict=True)
        if "refused" not in cell
    ]
    return math.exp(statistics.fmean(logs)) if logs else math.nan


def _time(lines: Sequence[Line], form: str, rank: str) -> float:
    """Return the median of times relative to the whole Hessian's in the same run."""
    return statistics.median(
        line[form][rank]["seconds"] / line["whole"]["seconds"]
        for line in lines
        if "refused" not in line[form][rank]
    )


def _stored(rank: str) -> float:
    """Return the numbers a row carries, weights, variances and `(r, r)`, over `in²`."""
    return (int(rank) ** 2 + 2 * INPUTS) / INPUTS**2


def _cheaper(lines: Sequence[Line]) -> Finding | None:
    if not lines:
        return None
    ranks = _ranks(lines)
    told = ", ".join(f"{_time(lines, 'rest', rank):.2f} at r = {rank}" for rank in ranks)
    faster = [_time(lines, "rest", rank) < 1 for rank in ranks]
    return Finding(
        f"time over the whole Hessian's: {told}; a row carries {_stored(ranks[0]):.1%} to "
        f"{_stored(ranks[-1]):.1%} of the numbers",
        "yes" if all(faster) else "in part",
    )


def _enough(form: str, lines: Sequence[Line]) -> Finding | None:
    """Judge by a tenth more error than the whole Hessian's."""
    if not lines:
        return None
    told = ", ".join(
        f"{_ratio(lines, form, rank):.2f} at r = {rank}" for rank in ("0", *_ranks(lines))
    )
    near = [
        rank
        for rank in _ranks(lines)
        if _ratio(lines, form, rank) < 1.1 and _time(lines, form, rank) < 1
    ]
    return Finding(
        f"error over the whole Hessian's: {told}",
        "yes, within a tenth" if near else "no",
    )


def draw(lines: Sequence[Line], folder: Path) -> list[str]:
    """Return the table and the figure."""
    tried: dict[str, list[str]] = {}
    for line in lines:
        tried.setdefault(f"{line['model']}'s {line['layer']}", []).append(line["pattern"])
    layers = "; ".join(f"{layer} at {', '.join(own)}" for layer, own in tried.items())
    parts = [
        "## Optimal Brain Surgeon on a dominant eigenspace",
        "",
        f"Down projections, {INPUTS:,} inputs, {ROWS} of their outputs: {layers}. Error and time "
        f"relative to OBS with the whole Hessian in the same run, over these {len(lines)} cells: "
        "geometric mean of errors, in brackets on text that the Hessian has not seen; median of "
        "CPU times, of which a whole layer would spend less on the "
        "eigenvectors. Every choice is refitted with the whole Hessian. r = 0 is its diagonal. "
        f"OBS refuses {_refusals(lines)} as too ill-conditioned for float32; they are left out.",
        "",
        "| r | share of the trace | a row's numbers, of in² "
        + "".join(f"| {title}: error | time " for title in FORMS.values())
        + "|",
        "|---" * (3 + 2 * len(FORMS)) + "|",
        f"| 0 | | | {_errors(lines, 'rest', '0')} | | {_errors(lines, 'rest', '0')} | |",
    ]
    for rank in _ranks(lines):
        shares = [line["spectrum"][rank] for line in lines]
        row = [rank, f"{min(shares):.0%} to {max(shares):.0%}", f"{_stored(rank):.2%}"]
        for form in FORMS:
            row += [_errors(lines, form, rank), f"{_time(lines, form, rank):.2f}"]
        parts.append("| " + " | ".join(row) + " |")
    _figure(lines, folder / "experiments-eigenspace.png")
    return [
        *parts,
        "",
        "Up to r = 16 the dominant eigenspace alone chooses worse than the diagonal: it says that "
        "what it leaves out is flat. Its figures at 64 and 192 are of the cells that float32 "
        "can hold. With the diagonal of the rest it is better than the diagonal at every rank, but "
        "far from the whole even where it holds most of the trace: what a removal costs depends on "
        "`H⁻¹`, which is made of the small eigenvalues first. On other text less is lost, since "
        "the whole Hessian fits its own text too: SmolLM2's is made of 4,096 tokens. Time ends the "
        "trade: the whole Hessian works on blocks of removals and on fewer inputs as they go, "
        "while here every removal passes over `(r, r)` numbers a row. What is saved is memory.",
        "",
        "![error and time by rank](img/experiments-eigenspace.png)",
    ]


def _refusals(lines: Sequence[Line]) -> str:
    """Count the choices that no mask came of, by form."""
    counts = []
    for form, title in FORMS.items():
        cells = [cell for line in lines for cell in line[form].values()]
        refused = sum("refused" in cell for cell in cells)
        counts.append(f"{refused} of {len(cells)} choices ({title})")
    return " and ".join(counts)


def _errors(lines: Sequence[Line], form: str, rank: str) -> str:
    own, other = (_ratio(lines, form, rank, judge) for judge in ("error", "other"))
    return f"{own:.3f} ({other:.3f})"


def _figure(lines: Sequence[Line], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    *panels, last = figure.subplots(1, 1 + len(PATTERNS))
    ranks = _ranks(lines)
    places = [int(rank) for rank in ranks]
    for axes, pattern in zip(panels, PATTERNS, strict=True):
        for number, model in enumerate(MODELS):
            own = [line for line in lines if (line["model"], line["pattern"]) == (model, pattern)]
            if not own:
                continue
            for form, style in zip(FORMS, ("x--", "o-"), strict=True):
                curve = [_ratio(own, form, rank) for rank in ranks]
                axes.plot(places, curve, style, color=f"C{number}", label=f"{model}, {form}")
            level = _ratio(own, "rest", "0")
            axes.axhline(level, color=f"C{number}", linestyle=":", label=f"{model}, diagonal")
        axes.axhline(1, color="0.5", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="rank r", title=pattern)
        axes.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("error, multiple of the whole Hessian's")
    panels[0].legend(fontsize="x-small")
    for form, style in zip(FORMS, ("x--", "o-"), strict=True):
        last.plot(places, [_time(lines, form, rank) for rank in ranks], style, label=form)
    last.axhline(1, color="0.5", linewidth=0.8)
    last.set(xscale="log", yscale="log", xlabel="rank r", title="time, multiple of the whole's")
    last.grid(alpha=0.3, which="both")
    last.legend(fontsize="x-small")
    figure.savefig(path, dpi=100)


_PAPER = "Hassibi et al., NIPS 1993"
EXPERIMENT = Experiment(
    "eigenspace",
    "Optimal Brain Surgeon on a dominant eigenspace",
    (
        Claim(_PAPER, "the dominant eigenspace costs less time and storage", _cheaper),
        Claim(
            _PAPER,
            "it can stand for the whole Hessian (the premise; no figure of theirs is at hand)",
            partial(_enough, "dominant"),
        ),
        Claim(
            "this project's form of it",
            "it can do so together with the diagonal of the rest",
            partial(_enough, "rest"),
        ),
    ),
    runs,
    draw,
)

if __name__ == "__main__":
    main(EXPERIMENT)
