"""A recurrent network pruned by its Hessians and by magnitude: W and R apart, and both.

Pedersen and Hansen ("Recurrent Networks: Second Order Properties and Pruning", NIPS 1994) prune
recurrent networks by Optimal Brain Surgeon, with the Hessian of the whole cost, on time series.
Here an LSTM and a GRU of 64 units read a digit of MNIST row by row, are trained on 7,000 of the
10,000 digits, exported to ONNX by torch, pruned once without training, and judged on the other
3,000. Each of W (what a row weighs) and R (what the last state weighs) is a layer with a
Hessian of its own. The output's matrix stays as it is.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from lab import Claim, Experiment, Finding, Line, Run, Settings, main
from mnist import labelled_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import iobs_onnx

_LAYERS = {"target": "layer", "bias_compensation": 0.0, "sequential": "site"}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"solver": "magnitude", **_LAYERS, "sequential": "none"},
    "L-OBS": {"solver": "lobs", **_LAYERS},
    "OBS": {"solver": "obs", **_LAYERS},
    "defaults": {},
}
PARTS = {"W": ("*weight_ih*",), "R": ("*weight_hh*",), "W and R": ("*weight_ih*", "*weight_hh*")}
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
KINDS = ("LSTM", "GRU")
TRAINED = 7000
CALIBRATED = 512


class Reader(nn.Module):
    """Digits, `(n, 28, 28)`, to scores, `(n, 10)`: by the state after the last row."""

    def __init__(self, kind: str, units: int = 64) -> None:
        super().__init__()
        self.rnn: nn.RNNBase = getattr(nn, kind)(28, units, batch_first=True)
        self.head = nn.Linear(units, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        scores: Tensor = self.head(self.rnn(x)[0][:, -1])
        return scores


def runs(settings: Settings) -> Iterator[Run]:
    """The dense network of each kind and seed, then parts, shares and methods."""
    kinds, seeds, shares = (
        (("LSTM",), (0,), (0.8,)) if settings.quick else (KINDS, (0, 1), SPARSITIES)
    )
    epochs = 1 if settings.quick else 8
    parts, methods = (("W and R",), ("magnitude", "OBS")) if settings.quick else (PARTS, METHODS)
    for kind, seed in product(kinds, seeds):
        task = partial(_network, settings.shared, kind, seed, epochs)
        key = {"kind": kind, "seed": seed}
        yield Run({**key, "method": "dense"}, lambda task=task: {"accuracy": _judge(*task())})
        for part, share, method in product(parts, shares, methods):
            measure = partial(_prune, task, part, share, method)
            yield Run({**key, "method": method, "part": part, "sparsity": share}, measure)


@cache
def _network(shared: Path, kind: str, seed: int, epochs: int) -> tuple[bytes, Path]:
    """Return a trained network as ONNX, and where its digits are."""
    x, y = (part[:TRAINED] for part in labelled_digits(shared))
    torch.manual_seed(seed)
    network = Reader(kind)
    steps = epochs * (len(x) // 64)
    optimiser = torch.optim.Adam(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64)[: len(x) // 64]:
            optimiser.zero_grad()
            cross_entropy(network(x[rows]), y[rows]).backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    return _exported(network.eval()), shared


def _exported(network: Reader) -> bytes:
    shapes = {"x": {0: torch.export.Dim("batch")}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            network,
            (torch.zeros(2, 28, 28),),
            input_names=["rows"],
            output_names=["scores"],
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # what the exporter returns with dynamo
    return program.model_proto.SerializeToString()


def _judge(model: bytes, shared: Path) -> float:
    """Return the accuracy on digits not trained on, in percent."""
    x, y = (part[TRAINED:] for part in labelled_digits(shared))
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"rows": x.numpy()})
    return round(100 * float((torch.from_numpy(scores).argmax(1) == y).double().mean()), 2)


def _prune(task: Any, part: str, share: float, method: str) -> Line:
    model, shared = task()
    x, _ = labelled_digits(shared)
    with tempfile.TemporaryDirectory(prefix="recurrent-") as folder:
        dense, output = Path(folder) / "dense.onnx", Path(folder) / "sparse.onnx"
        onnx.save(onnx.load_from_string(model), dense)
        result = iobs_onnx.prune(
            dense,
            calibration={"rows": x[:CALIBRATED].numpy()},
            sparsity=share,
            output=output,
            include=PARTS[part],
            **METHODS[method],
        )
        return {
            "accuracy": _judge(output.read_bytes(), shared),
            "layer_error": result.report.totals["layer_error_geomean"],
        }


def mean(lines: Sequence[Line], **key: object) -> float | None:
    """Return the accuracy over the seeds, or None where nothing was run."""
    found = [line["accuracy"] for line in lines if key.items() <= line.items()]
    return sum(found) / len(found) if found else None


def _cases(lines: Sequence[Line]) -> list[dict[str, Any]]:
    pruned = [line for line in lines if "part" in line]
    names = ("kind", "part", "sparsity")
    return [
        dict(zip(names, case, strict=True))
        for case in dict.fromkeys(tuple(line[name] for name in names) for line in pruned)
    ]


def _ahead(first: str, second: str, lines: Sequence[Line]) -> Finding | None:
    gaps = {}
    for case in _cases(lines):
        ahead, behind = (mean(lines, method=name, **case) for name in (first, second))
        if ahead is not None and behind is not None:
            gaps["{kind}, {part}, {sparsity:.0%}".format(**case)] = ahead - behind
    if not gaps:
        return None
    won = sum(gap > 0 for gap in gaps.values())
    ends = (min(gaps, key=gaps.__getitem__), max(gaps, key=gaps.__getitem__))
    told = " to ".join(f"{gaps[case]:+.1f} points ({case})" for case in ends)
    agrees = "yes" if won == len(gaps) else "no" if won <= len(gaps) / 2 else "in part"
    return Finding(f"{first} ahead in {won} of {len(gaps)} cases, from {told}", agrees)


def _memory(lines: Sequence[Line]) -> Finding | None:
    told, least = [], 1.0
    for kind in KINDS:
        dense = mean(lines, kind=kind, method="dense")
        if dense is None or len(_cases(lines)) < len(KINDS) * len(PARTS) * len(SPARSITIES):
            return None
        lost = {
            share: dense - (mean(lines, kind=kind, method="OBS", part="R", sparsity=share) or 0)
            for share in SPARSITIES
        }
        most = max((share for share in SPARSITIES if lost[share] <= 1), default=0.0)
        least = min(least, most)
        told.append(f"{kind} within a point of {dense:.1f} up to {most:.0%} of R removed")
    return Finding(", ".join(told), "yes" if least >= 0.8 else "in part" if least else "no")


def draw(lines: Sequence[Line], folder: Path) -> list[str]:
    """Return a table a kind and one figure of all."""
    parts = [
        "## Recurrent networks",
        "",
        f"An LSTM and a GRU of 64 units read MNIST's digits row by row: {TRAINED:,} to train on, "
        f"{CALIBRATED} of these to calibrate on, 3,000 others to judge; accuracy in percent, mean "
        "of two networks each, by the share of weights removed from W, from R, or from each of "
        "both. In brackets the geometric mean of layer errors. Nothing is trained afterwards. "
        '"defaults" is I-OBS as `prune` has it, aiming at the dense model\'s states; the others '
        "aim at each layer's own output.",
        "",
    ]
    for kind in dict.fromkeys(line["kind"] for line in lines):
        dense = mean(lines, kind=kind, method="dense")
        shares = " | ".join(f"{share:.0%}" for share in SPARSITIES)
        parts += [
            f"| {kind}, dense {dense:.2f} | | {shares} |",
            "|---" * (len(SPARSITIES) + 2) + "|",
        ]
        for part, method in product(PARTS, METHODS):
            cells = [_cell(lines, kind, part, method, share) for share in SPARSITIES]
            parts.append(f"| {part} | {method} | " + " | ".join(cells) + " |")
        parts.append("")
    _figure(lines, folder / "experiments-recurrent.png")
    return [
        *parts,
        "At about the same layer error R loses more than W does: what is wrong in a state is "
        "handed on from row to row, and an error measured within one step does not tell it.",
        "",
        "![accuracy against weights removed](img/experiments-recurrent.png)",
    ]


def _cell(lines: Sequence[Line], kind: str, part: str, method: str, share: float) -> str:
    key = {"kind": kind, "part": part, "method": method, "sparsity": share}
    own = [line for line in lines if key.items() <= line.items()]
    if not own:
        return ""
    error = sum(line["layer_error"] for line in own) / len(own)
    return f"{mean(own):.2f} ({error:.3f})"


def _figure(lines: Sequence[Line], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    grid = figure.subplots(len(KINDS), len(PARTS), sharex=True, sharey=True)
    for row, kind in zip(grid, KINDS, strict=True):
        for axes, part in zip(row, PARTS, strict=True):
            for method in METHODS:
                key = {"kind": kind, "part": part, "method": method}
                points = [(100 * s, mean(lines, **key, sparsity=s)) for s in SPARSITIES]
                shown = [point for point in points if point[1] is not None]
                axes.plot(*zip(*shown, strict=True), "o-", label=method, alpha=0.7)
            dense = mean(lines, kind=kind, method="dense")
            axes.axhline(dense, color="0.5", linestyle="--", label="dense")
            axes.set_title(f"{kind}, {part}", fontsize="medium")
            axes.grid(alpha=0.3)
        row[0].set_ylabel("accuracy, %")
    for axes in grid[-1]:
        axes.set_xlabel("weights removed, %")
    grid[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=90)


_HASSIBI = "Hassibi & Stork, NIPS 1992"
EXPERIMENT = Experiment(
    "recurrent",
    "Recurrent networks",
    (
        Claim(
            f"Pedersen & Hansen, NIPS 1994; {_HASSIBI}",
            "of a recurrent network too, OBS keeps more than magnitude does",
            partial(_ahead, "OBS", "magnitude"),
        ),
        Claim(
            "Pedersen & Hansen, NIPS 1994",
            "the memory of a recurrent network needs few of its weights",
            _memory,
        ),
    ),
    runs,
    draw,
)

if __name__ == "__main__":
    main(EXPERIMENT)
