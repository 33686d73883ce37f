"""Phase transitions: how many observations k-IHT, Topk-I-OBS and I-OBS need, not quadratic losses.

Observed are m times `x`, `(64,)`, standard normal; `w*` has k* entries ±1 at random places. An
algorithm is told k: k*, or twice as many.

*Logistic regression.* Labels are drawn with `σ(2 xᵀw*)`; the loss has a ridge of 0.01, for
separable data have no minimum without. A trial succeeds when the k* largest of the result are the
support of `w*`. All start from 0. Labels may leave no way to find the support: "oracle" says in
how many trials the minimiser on the support of `w*` has no more loss than the best result of all.

*Phase retrieval.* `y = (xᵀw*)²`. A trial succeeds when the result is `w*` or `−w*` to 1e-3. The
start is that of Jagatap and Hegde ("Sample-Efficient Algorithms for Recovering Structured Signals
From Magnitude-Only Measurements", 2019): the k largest `mean(y x_j²)`, and on these the first
eigenvector of `mean(y x xᵀ)`. The Hessian `mean((3z² − y) x xᵀ)` is not positive far from a
solution; the second-order steps use `mean(2z² x xᵀ)`, its Gauss-Newton part, damped by 0.01. L is
the largest eigenvalue of `mean(2y x xᵀ)`, the Hessian at `w*`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median

import torch
from lab import Claim, Experiment, Finding, Line, Run, Settings, main
from torch import Tensor

from iobs_onnx.recovery import (
    Iterate,
    Objective,
    Options,
    Recovery,
    iobs,
    k_iht,
    logistic,
    quadratic_regression,
    topk_iobs,
)

D = 64
LOSSES = ("logistic", "phase retrieval")
ALGORITHMS = ("k-IHT", "Topk-I-OBS", "I-OBS")
SIZES = ((4, 4), (4, 8), (8, 8), (8, 16))  # k*, k
RATIOS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TRIALS = 10
STEPS = {"k-IHT": 1000, "Topk-I-OBS": 30, "I-OBS": 30}
RIDGE, DAMPING = 0.01, 0.01
FOUND = 1e-3


def runs(settings: Settings) -> Iterator[Run]:
    """By loss, k* and k, observations a weight and seed."""
    for loss, (nonzeros, k) in product(LOSSES, SIZES[:1] if settings.quick else SIZES):
        for ratio, seed in product(RATIOS[-1:] if settings.quick else RATIOS, (0, 1)):
            key = {"loss": loss, "nonzeros": nonzeros, "k": k, "ratio": ratio, "seed": seed}
            trials = 2 if settings.quick else TRIALS
            yield Run(key, partial(_trials, loss, nonzeros, k, round(ratio * D), seed, trials))


def _trials(loss: str, nonzeros: int, k: int, m: int, seed: int, trials: int) -> Line:
    """Return each algorithm's rate of success, and the steps of each that succeeds."""
    generator = torch.Generator().manual_seed(seed)
    wins: dict[str, list[int]] = {name: [] for name in ALGORITHMS}
    statuses: dict[str, dict[str, int]] = {name: {} for name in ALGORITHMS}
    fair = 0
    for _ in range(trials):
        x = torch.randn(m, D, generator=generator, dtype=torch.float64)
        w = torch.zeros(D, dtype=torch.float64)
        where = torch.randperm(D, generator=generator)[:nonzeros]
        w[where] = torch.randint(2, (nonzeros,), generator=generator).double() * 2 - 1
        if loss == "logistic":
            y = torch.bernoulli((2 * x @ w).sigmoid(), generator=generator)
            objective, start, lipschitz = logistic(x, y, ridge=RIDGE), torch.zeros_like(w), None
        else:
            y = (x @ w).square()
            objective, start = _gauss_newton(x, y), spectral(x, y, k)
            lipschitz = float(torch.linalg.eigvalsh(2 * (x.T * y) @ x / m)[-1])
        least = float("inf")
        for name in ALGORITHMS:
            steps, found = _solve(name, objective, start, k, lipschitz, w)
            least = min(least, found.trace.loss[-1])
            wins[name] += [] if steps is None else [steps]
            statuses[name][found.status] = statuses[name].get(found.status, 0) + 1
        if loss == "logistic" and k == nonzeros:
            best = topk_iobs(logistic(x[:, where], y, ridge=RIDGE), start[:k], k)
            fair += best.trace.loss[-1] <= least + 1e-9
    told = {"oracle": fair / trials} if loss == "logistic" and k == nonzeros else {}
    return {
        **told,
        **{
            name: {
                "success": len(wins[name]) / trials,
                "steps": median(wins[name]) if wins[name] else None,
                "statuses": statuses[name],
            }
            for name in ALGORITHMS
        },
    }


def _solve(
    name: str, objective: Objective, start: Tensor, k: int, lipschitz: float | None, target: Tensor
) -> tuple[int | None, Recovery]:
    """Return after how many steps the result was reached for good, None if never, and the run."""
    right: list[bool] = []
    retrieval = lipschitz is not None

    def see(here: Iterate) -> bool:
        right.append(_right(here.weight, target, retrieval))
        return retrieval and right[-1]

    options = Options(
        damping=DAMPING if retrieval and name != "k-IHT" else 0.0,
        max_steps=STEPS[name],
        tolerance=1e-8,
    )
    if name == "k-IHT":
        found = k_iht(objective, start, k, lipschitz=lipschitz, options=options, callback=see)
    else:
        algorithm = topk_iobs if name == "Topk-I-OBS" else iobs
        found = algorithm(objective, start, k, options=options, callback=see)
    if not right[-1]:
        return None, found
    return len(right) - right[::-1].index(False) if False in right else 0, found


def _right(w: Tensor, target: Tensor, retrieval: bool) -> bool:
    if retrieval:
        off = min(float((w - target).norm()), float((w + target).norm()))
        return off < FOUND * float(target.norm())
    largest = w.abs().topk(int(target.count_nonzero())).indices
    return bool((target[largest] != 0).all())


def _gauss_newton(x: Tensor, y: Tensor) -> Objective:
    whole = quadratic_regression(x, y)
    return Objective(whole.evaluate, lambda w: (x.T * (2 * (x @ w).square() / len(x))) @ x)


def spectral(x: Tensor, y: Tensor, k: int) -> Tensor:
    """Return the start of sparse phase retrieval: k non-zeros, of the norm that `y` tells."""
    chosen = (x.square() * y[:, None]).mean(0).topk(k).indices
    part = x[:, chosen]
    _, vectors = torch.linalg.eigh((part.T * y) @ part / len(x))
    return torch.zeros(x.shape[1], dtype=x.dtype).index_copy_(
        0, chosen, vectors[:, -1] * y.mean().sqrt()
    )


def cell(lines: Sequence[Line], name: str, **key: object) -> tuple[float, float | None]:
    """Return an algorithm's rate of success over the seeds, and the median of its steps."""
    own = [line[name] for line in lines if key.items() <= line.items()]
    steps = [found["steps"] for found in own if found["steps"] is not None]
    return sum(found["success"] for found in own) / len(own), median(steps) if steps else None


def _cells(lines: Sequence[Line]) -> list[dict[str, object]]:
    names = ("loss", "nonzeros", "k", "ratio")
    return [
        dict(zip(names, values, strict=True))
        for values in dict.fromkeys(tuple(line[name] for name in names) for line in lines)
    ]


def _more_often(loss: str, name: str, lines: Sequence[Line]) -> Finding | None:
    gaps = [
        cell(lines, name, **key)[0] - cell(lines, "k-IHT", **key)[0]
        for key in _cells(lines)
        if key["loss"] == loss
    ]
    if not gaps:
        return None
    ahead, behind = sum(gap > 1e-9 for gap in gaps), sum(gap < -1e-9 for gap in gaps)
    agrees = "no" if ahead <= behind else "in part" if behind else "yes"
    return Finding(
        f"ahead in {ahead} of {len(gaps)} cells, behind in {behind}: success "
        f"{sum(gaps) / len(gaps):+.0%} on average, {min(gaps):+.0%} to {max(gaps):+.0%}",
        agrees,
    )


def _sooner(loss: str, lines: Sequence[Line]) -> Finding | None:
    both = [
        (ours, theirs)
        for key in _cells(lines)
        for ours, theirs in [(cell(lines, "I-OBS", **key)[1], cell(lines, "k-IHT", **key)[1])]
        if key["loss"] == loss and ours is not None and theirs is not None
    ]
    if not both:
        return None
    fewer, more = sum(a < b for a, b in both), sum(a > b for a, b in both)
    ours, theirs = (median(steps) for steps in zip(*both, strict=True))
    agrees = "no" if fewer <= len(both) / 2 else "in part" if more else "yes"
    return Finding(
        f"fewer in {fewer} of the {len(both)} cells where both do, more in {more}; medians "
        f"{ours:g} and {theirs:g}",
        agrees,
    )


def _half(lines: Sequence[Line], name: str, key: dict[str, object]) -> str:
    """Return the m/d from which half of the trials succeed, between two cells by a line."""
    rates = [cell(lines, name, **key, ratio=ratio)[0] for ratio in RATIOS]
    if rates[0] >= 0.5:
        return f"below {RATIOS[0]:g}"
    for (a, b), (low, high) in zip(pairwise(RATIOS), pairwise(rates), strict=True):
        if low < 0.5 <= high:
            return f"{a + (b - a) * (0.5 - low) / (high - low):.2f}"
    return f"over {RATIOS[-1]:g}"


def draw(lines: Sequence[Line], folder: Path) -> list[str]:
    """Return the table of half successes and the figure."""
    parts = [
        "## Phase transitions",
        "",
        f"m observations of a vector of {D} weights, k* of them ±1; {2 * TRIALS} trials a cell. "
        "From which m/d on half of the trials succeed, and in brackets the median of steps after "
        "which those at the largest m/d stay right. Logistic: the support is found; phase "
        "retrieval: the vector is, to 0.1 %. All algorithms start at the same point.",
        "",
        "| loss | k*/k | " + " | ".join(ALGORITHMS) + " |",
        "|---" * (2 + len(ALGORITHMS)) + "|",
    ]
    for loss, (nonzeros, k) in product(LOSSES, SIZES):
        key = {"loss": loss, "nonzeros": nonzeros, "k": k}
        told = []
        for name in ALGORITHMS:
            steps = cell(lines, name, **key, ratio=RATIOS[-1])[1]
            told.append(_half(lines, name, key) + (f" ({steps:g})" if steps is not None else ""))
        parts.append(f"| {loss} | {nonzeros}/{k} | " + " | ".join(told) + " |")
    _figure(lines, folder / "experiments-phase-transition.png")
    runs_of, cut = (
        sum(sum(x["k-IHT"]["statuses"].values()) for x in lines if x["loss"] == LOSSES[1]),
        sum(x["k-IHT"]["statuses"].get("max_steps", 0) for x in lines if x["loss"] == LOSSES[1]),
    )
    return [
        *parts,
        "",
        "I-OBS needs the fewest observations, or as few as k-IHT. Topk-I-OBS takes the same Newton "
        "step as I-OBS and keeps the largest of it: what sets them apart is the projection. With "
        "k = 2k* and few observations that makes Topk-I-OBS worse than k-IHT; with k = k* it is "
        "better. With k = k* k-IHT, whose steps are short, stays on a wrong support. In logistic "
        "regression a support is mostly found by the first step or never, so that fewer steps "
        f"are not to be had. In phase retrieval {cut} of {runs_of} runs of k-IHT were cut at "
        f"{STEPS['k-IHT']:,} steps. The dashed line says in how many trials `w*`'s support is the "
        "best that was met: what I-OBS misses below it, it misses by its search.",
        "",
        "![success against observations](img/experiments-phase-transition.png)",
    ]


def _figure(lines: Sequence[Line], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    grid = figure.subplots(len(LOSSES), len(SIZES), sharey=True)
    for row, loss in zip(grid, LOSSES, strict=True):
        for axes, (nonzeros, k) in zip(row, SIZES, strict=True):
            key = {"loss": loss, "nonzeros": nonzeros, "k": k}
            for name in ALGORITHMS:
                rates = [cell(lines, name, **key, ratio=ratio)[0] for ratio in RATIOS]
                axes.plot(RATIOS, rates, "o-", label=name, alpha=0.7)
            fair = [
                [x["oracle"] for x in lines if {**key, "ratio": r}.items() <= x.items()]
                for r in RATIOS
                if loss == "logistic" and nonzeros == k
            ]
            if fair:
                rates = [sum(shares) / len(shares) for shares in fair]
                axes.plot(RATIOS, rates, "--", color="0.5", label="w*'s support is best")
            axes.set_title(f"{loss}, k*/k = {nonzeros}/{k}", fontsize="medium")
            axes.grid(alpha=0.3)
        row[0].set_ylabel("share of trials")
        row[0].legend(fontsize="small")
    for axes in grid[-1]:
        axes.set_xlabel("observations m / d")
    figure.savefig(path, dpi=90)


_PAPER = "Wu et al., NeurIPS 2024"
EXPERIMENT = Experiment(
    "phase_transition",
    "Phase transitions",
    (
        *(
            Claim(
                _PAPER,
                f"{name} recovers more often than k-IHT ({loss})",
                partial(_more_often, loss, name),
            )
            for loss, name in product(LOSSES, ALGORITHMS[1:])
        ),
        *(
            Claim(
                _PAPER, f"I-OBS recovers in fewer steps than k-IHT ({loss})", partial(_sooner, loss)
            )
            for loss in LOSSES
        ),
    ),
    runs,
    draw,
)

if __name__ == "__main__":
    main(EXPERIMENT)
