"""The rate of recovery: what a step of k-IHT, Topk-I-OBS and I-OBS leaves, and its bound.

Let `w*` have k* non-zeros, `e_t = ‖w_t − w*‖`, and `w⁺` be the dense step from `w_t`.

*Projection.* The `k ≥ k*` largest of `w⁺` are at most `1 + √min(k*/k, (d − k)/(d − k*))` times
as far from `w*` as `w⁺` is: what is cut off weighs no more than as many others, of which `w*` has
few. In the metric of H, with condition number κ, the cut of I-OBS is no worse than that of the
smallest with no compensation, so its factor is at most `1 + √(κ (d − k)/(d − k*))`, for the exact
projection; the greedy one has no such guarantee. Call the factors p.

*Dense step.* On a quadratic, a Newton step of length η leaves `1 − η` of the error, and a gradient
step `1/L` at most `1 − 1/κ`; so `e_(t+1) ≤ p (1 − η) e_t`, or `p (1 − 1/κ) e_t`. Where the Hessian
is M-Lipschitz and at least μ at `w_t`, a Newton step leaves `M e_t² / 2μ`, so
`e_(t+1) ≤ p M/2μ e_t²`: local quadratic convergence, as in the theorem of Wu et al., NeurIPS 2024,
against the linear one of k-IHT. The constants are those of this derivation.

Quadratics have eigenvalues spread evenly in their logarithm from 1 to κ in a random basis. In
12 dimensions I-OBS tries every support, in 64 it is greedy. The logistic loss is that of labels
`σ(Xw*)`, whose minimum is `w*`; M is at most `max‖x_i‖ λ_max(XᵀX/n) / (6√3)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, pairwise, product
from pathlib import Path

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
    quadratic,
    topk_iobs,
)

ALGORITHMS: dict[str, Callable[..., Recovery]] = {
    "k-IHT": k_iht,
    "Topk-I-OBS": topk_iobs,
    "I-OBS": iobs,
}
KAPPAS = (3.0, 10.0, 100.0, 1000.0)
# Dimension, k* and the k that are tried.
SIZES = ((12, 2, (2, 4, 6)), (64, 4, (4, 8, 16)))
RATE = 0.5
FOUND = 1e-6
STEPS = {"k-IHT": 1000, "Topk-I-OBS": 100, "I-OBS": 100}
# Errors below this are rounding.
ROUNDING = 1e-9


def runs(settings: Settings) -> Iterator[Run]:
    """Quadratics by size, κ, k and seed; then logistic losses."""
    sizes, kappas = (SIZES[:1], KAPPAS[::2]) if settings.quick else (SIZES, KAPPAS)
    trials = 2 if settings.quick else 20
    for (d, nonzeros, kept), seed in product(sizes, (0, 1)):
        for k in kept:
            key = {"d": d, "nonzeros": nonzeros, "k": k, "seed": seed}
            for kappa in kappas:
                measure = partial(_quadratics, d, nonzeros, k, kappa, seed, trials)
                yield Run({"loss": "quadratic", **key, "kappa": kappa}, measure)
            yield Run(
                {"loss": "logistic", **key}, partial(_logistics, d, nonzeros, k, seed, trials)
            )


def factors(d: int, nonzeros: int, k: int, kappa: float) -> dict[str, float]:
    """Return by how much each projection lengthens the distance to `w*` at most."""
    rest = (d - k) / (d - nonzeros)
    largest = 1 + math.sqrt(min(nonzeros / k, rest))
    return {"k-IHT": largest, "Topk-I-OBS": largest, "I-OBS": 1 + math.sqrt(kappa * rest)}


def sparse(d: int, nonzeros: int, generator: torch.Generator) -> Tensor:
    """Return `(d,)` float64 with so many standard normal entries at random places."""
    w = torch.zeros(d, dtype=torch.float64)
    where = torch.randperm(d, generator=generator)[:nonzeros]
    w[where] = torch.randn(nonzeros, generator=generator, dtype=torch.float64)
    return w


def _iterates(
    name: str, objective: Objective, start: Tensor, k: int, target: Tensor, rate: float, most: int
) -> tuple[list[Tensor], list[float]]:
    """Return iterates and their distances to the target, down to where rounding begins."""
    weights: list[Tensor] = []

    def keep(here: Iterate) -> bool:
        weights.append(here.weight)
        return here.distance is not None and here.distance < ROUNDING

    options = Options(learning_rate=rate, max_steps=most, tolerance=None)
    found = ALGORITHMS[name](objective, start, k, options=options, target=target, callback=keep)
    return weights, list(found.trace.distance or ())


def _quadratics(d: int, nonzeros: int, k: int, kappa: float, seed: int, trials: int) -> Line:
    """Return each algorithm's worst step with its bound, and its whole steps to the solution."""
    generator = torch.Generator().manual_seed(seed)
    lengths = {"k-IHT": 1 - 1 / kappa, "Topk-I-OBS": 1 - RATE, "I-OBS": 1 - RATE}
    bounds = {n: p * lengths[n] for n, p in factors(d, nonzeros, k, kappa).items()}
    worst: dict[str, list[float]] = {name: [] for name in ALGORITHMS}
    steps: dict[str, list[int]] = {name: [] for name in ALGORITHMS}
    for _ in range(trials):
        basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
        spread = torch.logspace(0, math.log10(kappa), d, dtype=torch.float64)
        target = sparse(d, nonzeros, generator)
        start = torch.randn(d, generator=generator, dtype=torch.float64)
        objective = quadratic(basis @ (spread[:, None] * basis.T), target)
        for name in ALGORITHMS:
            rate = 1.0 if name == "k-IHT" else RATE
            _, errors = _iterates(name, objective, start, k, target, rate, 20)
            worst[name].append(max(b / a for a, b in pairwise(errors) if b > ROUNDING))
            _, errors = _iterates(name, objective, start, k, target, 1.0, STEPS[name])
            small = (step for step, error in enumerate(errors) if error < FOUND * errors[0])
            steps[name] += islice(small, 1)
    return {
        name: {
            "bound": bounds[name],
            "worst": max(worst[name]),
            "found": len(steps[name]) / trials,
            "steps": sum(steps[name]) / len(steps[name]) if steps[name] else None,
        }
        for name in ALGORITHMS
    }


def _logistics(d: int, nonzeros: int, k: int, seed: int, trials: int) -> Line:
    """Return the errors of the first trial, and the most that a step took up of its bound."""
    generator = torch.Generator().manual_seed(seed)
    shares: dict[str, float] = dict.fromkeys(("Topk-I-OBS", "I-OBS"), 0.0)
    curves: dict[str, list[float]] = {}
    for _ in range(trials):
        x = torch.randn(8 * d, d, generator=generator, dtype=torch.float64)
        target = sparse(d, nonzeros, generator)
        noise = torch.randn(d, generator=generator, dtype=torch.float64)
        start = target + noise * (0.5 * target.norm() / noise.norm())
        objective = logistic(x, (x @ target).sigmoid())
        assert objective.hessian is not None  # the logistic loss has one
        change = float(x.norm(dim=1).max() * torch.linalg.eigvalsh(x.T @ x / len(x))[-1])
        change /= 6 * math.sqrt(3)
        for name in ALGORITHMS:
            weights, errors = _iterates(name, objective, start, k, target, 1.0, 12)
            curves.setdefault(name, errors)
            for w, (before, after) in zip(weights, pairwise(errors), strict=False):
                if name == "k-IHT" or after < ROUNDING:
                    continue
                spectrum = torch.linalg.eigvalsh(objective.hessian(w))
                kappa = float(spectrum[-1] / spectrum[0])
                bound = factors(d, nonzeros, k, kappa)[name] * change / (2 * float(spectrum[0]))
                shares[name] = max(shares[name], after / (bound * before**2))
    return {"shares": shares, "errors": curves}


def _of(lines: Sequence[Line], loss: str) -> list[Line]:
    return [line for line in lines if line["loss"] == loss]


def _bounded(lines: Sequence[Line]) -> Finding | None:
    if not lines:
        return None
    cases, broken, nearest = 0, [], 0.0
    for line in _of(lines, "quadratic"):
        for name in ALGORITHMS:
            share = line[name]["worst"] / line[name]["bound"]
            cases, nearest = cases + 1, max(nearest, share)
            broken += [name] * (share > 1)
    for line in _of(lines, "logistic"):
        for name, share in line["shares"].items():
            cases, nearest = cases + 1, max(nearest, share)
            broken += [name] * (share > 1)
    text = f"kept in {cases - len(broken)} of {cases} cells; the nearest takes up {nearest:.0%}"
    return Finding(text, "in part" if broken else "yes")


def _independent(lines: Sequence[Line]) -> Finding | None:
    own = _of(lines, "quadratic")
    if not own:
        return None
    newton = {line[name]["steps"] for line in own for name in ("Topk-I-OBS", "I-OBS")}
    wide = max(line["kappa"] for line in own)
    cells = {k: _mean_steps(own, "k-IHT", k) for k in (min(line["kappa"] for line in own), wide)}
    told = ", ".join(
        f"{steps or math.nan:.0f} at κ = {kappa:g} ({found:.0%} of trials)"
        for kappa, (steps, found) in cells.items()
    )
    whole = "1 step" if newton == {1.0} else f"{min(newton)} to {max(newton)} steps"
    agrees = "yes" if newton == {1.0} else "no"
    return Finding(f"Newton: {whole} at every κ; k-IHT: {told}", agrees)


def _mean_steps(lines: Sequence[Line], name: str, kappa: float) -> tuple[float | None, float]:
    """Return the steps of the trials that end at `w*`, and the share of these."""
    own = [line[name] for line in lines if line["kappa"] == kappa]
    found = sum(cell["found"] for cell in own)
    steps = sum(cell["steps"] * cell["found"] for cell in own if cell["found"])
    return (steps / found if found else None), found / len(own)


def _quadratic_rate(lines: Sequence[Line]) -> Finding | None:
    own = _of(lines, "logistic")
    if not own:
        return None
    needed = {
        name: [
            next((t for t, e in enumerate(line["errors"][name]) if e < FOUND), math.inf)
            for line in own
        ]
        for name in ALGORITHMS
    }
    told = ", ".join(
        f"{name} {min(steps)} to {max(steps)}" if max(steps) < math.inf else f"{name} over 12"
        for name, steps in needed.items()
    )
    fast = max(needed["Topk-I-OBS"] + needed["I-OBS"]) < min(needed["k-IHT"])
    return Finding(f"steps to an error of {FOUND:g}: {told}", "yes" if fast else "no")


def draw(lines: Sequence[Line], folder: Path) -> list[str]:
    """Return the table of quadratics and the figure."""
    own = _of(lines, "quadratic")
    trials = "20 trials a seed, two seeds"
    parts = [
        "## Rates of recovery",
        "",
        "Random quadratics with a known k*-sparse minimiser, from a random start. Each cell is the "
        f"worst step's `‖w_(t+1) − w*‖ / ‖w_t − w*‖` / its bound ({trials}): k-IHT at 1/L, the "
        "others at half a Newton step, for a whole one ends at `w*`. In brackets the share of "
        "trials in which whole steps reach `w*`. "
        "The bounds are proved in the head of the program.",
        "",
        "| d | k*/k | κ | " + " | ".join(ALGORITHMS) + " |",
        "|---" * (3 + len(ALGORITHMS)) + "|",
    ]
    cells = dict.fromkeys((x["d"], x["nonzeros"], x["k"], x["kappa"]) for x in own)
    for d, nonzeros, k, kappa in cells:
        same = [x for x in own if (x["d"], x["k"], x["kappa"]) == (d, k, kappa)]
        told = []
        for name in ALGORITHMS:
            worst = max(line[name]["worst"] for line in same)
            found = sum(line[name]["found"] for line in same) / len(same)
            told.append(f"{worst:.2f} / {same[0][name]['bound']:.2f} ({found:.0%})")
        parts.append(f"| {d} | {nonzeros}/{k} | {kappa:g} | " + " | ".join(told) + " |")
    _figure(lines, folder / "experiments-recovery-rates.png")
    return [
        *parts,
        "",
        "A bound over 1 promises nothing. That of k-IHT is so wherever κ is not small; that of "
        "I-OBS in the 2-norm grows with √κ: it pays for measuring in the 2-norm what is projected "
        "in the metric of H. Its worst half steps do lengthen with κ, if far less than the bound, "
        "and with k = k* one can lead away from `w*`; whole ones end there.",
        "",
        "![worst step against its bound, and errors by step](img/experiments-recovery-rates.png)",
    ]


def _figure(lines: Sequence[Line], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    own = _of(lines, "quadratic")
    marks = dict(zip(dict.fromkeys(line["kappa"] for line in own), "osv^D", strict=False))
    for number, name in enumerate(ALGORITHMS):
        for kappa, mark in marks.items():
            cells = [line[name] for line in own if line["kappa"] == kappa]
            bounds, worst = [c["bound"] for c in cells], [c["worst"] for c in cells]
            label = name if mark == "o" else None
            left.plot(bounds, worst, mark, color=f"C{number}", label=label, alpha=0.6)
        curve = [(kappa, _mean_steps(own, name, kappa)[0]) for kappa in marks]
        shown = [point for point in curve if point[1] is not None]
        if shown:
            middle.plot(*zip(*shown, strict=True), "o-", color=f"C{number}", label=name)
    ends = [0.3, max(line[name]["bound"] for line in own for name in ALGORITHMS)]
    left.plot(ends, ends, color="0.5", linestyle="--", label="bound")
    left.set(xscale="log", yscale="log", xlabel="bound of a step", ylabel="worst step measured")
    middle.set(
        xscale="log", yscale="log", xlabel="condition number κ", ylabel="steps to w*, if found"
    )
    for line in _of(lines, "logistic"):
        for number, name in enumerate(ALGORITHMS):
            errors = [error for error in line["errors"][name] if error > 0]
            label = name if line is _of(lines, "logistic")[0] else None
            right.plot(errors, color=f"C{number}", label=label, alpha=0.6)
    right.set(yscale="log", xlabel="step", ylabel="‖w − w*‖, logistic loss")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)


_PAPER = "Wu et al., NeurIPS 2024"
EXPERIMENT = Experiment(
    "recovery_rates",
    "Rates of recovery",
    (
        Claim(_PAPER, "no step leaves more of the error than the bound says", _bounded),
        Claim(
            _PAPER,
            "the condition number slows k-IHT down, and neither Topk-I-OBS nor I-OBS",
            _independent,
        ),
        Claim(
            _PAPER,
            "near a solution second-order steps converge quadratically, those of k-IHT linearly",
            _quadratic_rate,
        ),
    ),
    runs,
    draw,
)

if __name__ == "__main__":
    main(EXPERIMENT)
