"""Optimal and Early Brain Damage on networks stopped early and on networks trained to the end.

Tresp, Neuneier, Zimmermann: "Early Brain Damage", NIPS 1996. Optimal Brain Damage takes the
training loss to be at its minimum, where a weight costs `½ H_jj w_j²`. Early Brain Damage allows
for a gradient `g_j` and judges a weight, kept or removed, by `½ H_jj (w_j − g_j / H_jj)²`; a
removed one comes back where that is more than a kept one's. This is about the loss of a network,
which is trained here: a layer's own quadratic, that `prune` uses, is at its minimum to begin with.

Networks of one hidden layer of tanh units learn the third of MONK's problems, with wrong labels
(122 robots to train on), and digits of 7 × 7 pixels (300). As many others are validated on; all
that is left, at most 4,000, is judged on. Full batches, Adam; "early" stops where the loss on the
validation set is least, "end" goes on by L-BFGS to the minimum. A quarter of the weights left is
removed at a time, by judgement over all layers, and the rest is trained on, in the same manner.

H is the Gauss-Newton Hessian of the training loss with its weight decay, damped by 0.01 of its
mean. OBS takes a minimum for granted too; I-OBS takes a Newton step first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import torch
from lab import Claim, Experiment, Finding, Line, Run, Settings, main
from mnist import labelled_digits
from monks import TASKS as MONKS
from monks import robots
from torch import Tensor
from torch.func import jacrev, vmap
from torch.nn.functional import avg_pool2d, cross_entropy

from iobs_onnx.recovery.support import compensate, obs_support

TASKS = {"MONK 3": (4, 1e-3, 8), "digits": (10, 1e-3, 4)}  # hidden units, decay, seeds
REGIMES = ("early", "end")
STAGES = 10
DAMPING = 0.01
# Steps of Adam at first and after each removal; of L-BFGS.
STEPS, RETRAIN, FINISH = 1500, 100, 500
Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Network:
    """Scores `V tanh(A x + b) + c`, its weights one vector, float64.

    Attributes:
        hidden: number of hidden units.
        classes: number of scores.
        decay: weight decay.
        train: cases `(n, inputs)` and their classes `(n,)`, as are the others.
        valid: to stop by.
        test: to judge by.
    """

    hidden: int
    classes: int
    decay: float
    train: Split
    valid: Split
    test: Split

    @property
    def sizes(self) -> list[int]:
        """Numbers of weights of `A`, `b`, `V`, `c`."""
        inputs = self.train[0].shape[1]
        return [inputs * self.hidden, self.hidden, self.hidden * self.classes, self.classes]

    def scores(self, w: Tensor, x: Tensor) -> Tensor:
        """Return the scores, `(n, classes)`."""
        a, b, v, c = w.split(self.sizes)
        return (x @ a.view(-1, self.hidden) + b).tanh() @ v.view(self.hidden, -1) + c

    def loss(self, w: Tensor) -> Tensor:
        """Return mean cross-entropy on the training cases plus ½ decay ‖w‖²."""
        x, y = self.train
        return cross_entropy(self.scores(w, x), y) + self.decay / 2 * w.dot(w)

    def error(self, w: Tensor) -> float:
        """Return the share of test cases that are wrong, in percent."""
        x, y = self.test
        return 100 * float((self.scores(w, x).argmax(1) != y).double().mean())

    def gradient(self, w: Tensor) -> Tensor:
        """Return that of the loss, by all weights."""
        w = w.detach().requires_grad_()
        return torch.autograd.grad(self.loss(w), w)[0]

    def hessian(self, w: Tensor) -> Tensor:
        """Return the damped Gauss-Newton Hessian over all weights."""
        x, _ = self.train
        rows = vmap(jacrev(lambda w, x: self.scores(w, x[None])[0]), (None, 0))(w, x)
        p = self.scores(w, x).softmax(1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        weighted = (inner @ rows).reshape(-1, len(w))
        h = rows.reshape(-1, len(w)).T @ weighted / len(x)
        h.diagonal().add_(self.decay)
        h.diagonal().add_(DAMPING * float(h.diagonal().mean()))
        return h

    def start(self, generator: torch.Generator) -> Tensor:
        """Return random weights, each layer's by its number of inputs."""
        inputs = self.train[0].shape[1]
        scale = [1 / math.sqrt(n) for n in (inputs, inputs, self.hidden, self.hidden)]
        spread = torch.cat([torch.full((n,), s) for n, s in zip(self.sizes, scale, strict=True)])
        return spread.double() * torch.randn(len(spread), generator=generator, dtype=torch.float64)

    def stopped(self, w: Tensor, kept: Tensor, steps: int) -> Tensor:
        """Return the weights of least validation loss on the way of so many steps of Adam."""
        w = w.clone().requires_grad_()
        optimiser = torch.optim.Adam([w], lr=1e-2)
        best, least = w.detach().clone(), math.inf
        for _ in range(steps + 1):
            with torch.no_grad():
                valid = float(cross_entropy(self.scores(w, self.valid[0]), self.valid[1]))
            if valid < least:
                best, least = w.detach().clone(), valid
            w.grad = torch.autograd.grad(self.loss(w), w)[0] * kept
            optimiser.step()
        return best

    def finished(self, w: Tensor, kept: Tensor) -> Tensor:
        """Return the weights at the end of L-BFGS on the kept ones."""
        z = w[kept].clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [z],
            max_iter=FINISH,
            history_size=50,
            tolerance_grad=1e-6,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            value = self.loss(torch.zeros_like(w).masked_scatter(kept, z))
            z.grad = torch.autograd.grad(value, z)[0]
            return value.detach()

        optimiser.step(closure)
        return torch.zeros_like(w).masked_scatter(kept, z.detach())


def runs(settings: Settings) -> Iterator[Run]:
    """What weights cost and the way down, by network, regime and method."""
    tasks = ("MONK 3",) if settings.quick else TASKS
    for task, regime in product(tasks, REGIMES):
        for seed in range(1 if settings.quick else TASKS[task][2]):
            trained = partial(_trained, settings.shared, task, regime, seed)
            key = {"task": task, "regime": regime, "seed": seed}
            yield Run({**key, "method": "judged"}, lambda t=trained: _costs(*t()))
            for method in METHODS:
                yield Run({**key, "method": method}, partial(_way, trained, method, regime))


def network(shared: Path, task: str, seed: int) -> Network:
    """Return an untrained network with its cases, drawn by the seed."""
    hidden, decay, _ = TASKS[task]
    generator = torch.Generator().manual_seed(seed)
    if task == "digits":
        images, y = labelled_digits(shared)
        x, count = avg_pool2d(images, 4).flatten(1).double(), 300
    else:
        x, labels = robots()
        y, count = labels[3].long(), MONKS[3].training
    drawn = torch.randperm(len(x), generator=generator)
    x, y = x[drawn], y[drawn]
    splits = [(x[a:b], y[a:b].clone()) for a, b in ((0, count), (count, 2 * count))]
    for _, seen in splits if task != "digits" else ():
        wrong = round(MONKS[3].noise * count)
        seen[:wrong] = 1 - seen[:wrong]
    rest = slice(2 * count, 2 * count + 4000)
    return Network(hidden, int(y.max()) + 1, decay, *splits, (x[rest], y[rest]))


@cache
def _trained(shared: Path, task: str, regime: str, seed: int) -> tuple[Network, Tensor]:
    net = network(shared, task, seed)
    start = net.start(torch.Generator().manual_seed(seed))
    every = torch.ones_like(start, dtype=torch.bool)
    w = net.stopped(start, every, STEPS)
    return net, (w if regime == "early" else net.finished(w, every))


def _saliency(net: Network, w: Tensor, gradient: bool) -> Tensor:
    h = net.hessian(w).diagonal()
    return h * (w - net.gradient(w) / h if gradient else w).square() / 2


def _costs(net: Network, w: Tensor) -> Line:
    """Return rank correlations of judged and true costs of a weight alone, set to zero."""
    from scipy.stats import spearmanr

    h, g = net.hessian(w).diagonal(), net.gradient(w)
    losses = vmap(net.loss, chunk_size=64)
    at_zero, least = torch.empty_like(w), torch.empty_like(w)
    shares = torch.linspace(-0.5, 2.5, 31, dtype=w.dtype)
    for j in range(len(w)):
        places = torch.cat([torch.zeros(1), w[j : j + 1], shares * (w[j] - g[j] / h[j])])
        tried = w.repeat(len(places), 1)
        tried[:, j] = places
        found = losses(tried)
        at_zero[j], least[j] = found[0], found.min()
    x, y = net.test
    without = w.repeat(len(w), 1).fill_diagonal_(0)
    unseen = vmap(lambda w: cross_entropy(net.scores(w, x), y), chunk_size=8)(without)
    costs = {"increase": at_zero - net.loss(w), "over its optimum": at_zero - least, "test": unseen}
    judged = {"OBD": _saliency(net, w, False), "EBD": _saliency(net, w, True)}
    return {
        "gradient": float(g.norm()),
        "test_error": net.error(w),
        "ranks": {
            name: {cost: float(spearmanr(s, true).statistic) for cost, true in costs.items()}
            for name, s in judged.items()
        },
    }


def _largest(values: Tensor, count: int) -> Tensor:
    return torch.zeros_like(values, dtype=torch.bool).index_fill_(
        0, values.topk(count).indices, True
    )


def _by(saliency: Callable[[Network, Tensor], Tensor], revives: bool) -> Callable[..., Split]:
    def step(net: Network, w: Tensor, kept: Tensor, count: int) -> Split:
        values = saliency(net, w)
        chosen = _largest(values if revives else values.masked_fill(~kept, -1), count)
        return w * chosen, chosen

    return step


def _surgeon(net: Network, w: Tensor, kept: Tensor, count: int, rate: float = 0.0) -> Split:
    """Remove by the whole Hessian, moving the kept ones; I-OBS takes a Newton step first."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(net.hessian(w)[kept][:, kept]))
    dense = w[kept] - rate * (inverse @ net.gradient(w)[kept])
    chosen = obs_support(dense, inverse, count, exhaustive_up_to=0)
    sparse = torch.zeros_like(w).masked_scatter(kept, compensate(dense, inverse, chosen))
    return sparse, torch.zeros_like(kept).masked_scatter(kept, chosen)


# Network, weights, mask and number to keep to weights and mask.
METHODS: dict[str, Callable[..., Split]] = {
    "magnitude": _by(lambda _, w: w.abs(), False),
    "OBD": _by(partial(_saliency, gradient=False), False),
    "EBD": _by(partial(_saliency, gradient=True), True),
    "EBD, none revived": _by(partial(_saliency, gradient=True), False),
    "OBS": _surgeon,
    "I-OBS": partial(_surgeon, rate=1.0),
}


def _way(trained: Callable[[], tuple[Network, Tensor]], method: str, regime: str) -> Line:
    net, w = trained()
    kept = torch.ones_like(w, dtype=torch.bool)
    left, errors, revived = [len(w)], [net.error(w)], [0]
    for stage in range(1, STAGES + 1):
        count = round(len(w) * 0.75**stage)
        w, chosen = METHODS[method](net, w, kept, count)
        revived.append(int((chosen & ~kept).sum()))
        kept = chosen
        w = net.stopped(w, kept, RETRAIN) if regime == "early" else net.finished(w, kept)
        left.append(count)
        errors.append(round(net.error(w), 3))
    return {"left": left, "test_error": errors, "revived": revived}


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def _own(lines: Sequence[Line], **key: object) -> list[Line]:
    return [line for line in lines if key.items() <= line.items()]


def _gap(lines: Sequence[Line], first: str, second: str, **key: object) -> tuple[float, float]:
    """Return by how many points of error the first is better, from half of the weights down."""
    gaps = []
    for line, other in zip(
        _own(lines, method=first, **key), _own(lines, method=second, **key), strict=True
    ):
        low = [number for number, left in enumerate(line["left"]) if left <= line["left"][0] / 2]
        gaps.append(fmean(other["test_error"][n] - line["test_error"][n] for n in low))
    return _mean(gaps)


def _misjudged(lines: Sequence[Line]) -> Finding | None:
    judged = _own(lines, method="judged")
    if not judged:
        return None
    told, better = [], []
    for task, regime in product(TASKS, REGIMES):
        ranks = {
            name: fmean(
                x["ranks"][name]["increase"] for x in _own(judged, task=task, regime=regime)
            )
            for name in ("OBD", "EBD")
        }
        told.append(f"{task} {regime} {ranks['OBD']:.3f} and {ranks['EBD']:.3f}")
        if regime == "early":
            better.append(ranks["EBD"] > ranks["OBD"])
    agrees = "yes" if all(better) else "in part" if any(better) else "no"
    return Finding("rank correlation, OBD and EBD: " + ", ".join(told), agrees)


def _better(first: str, second: str, regime: str, lines: Sequence[Line]) -> Finding | None:
    if not lines:
        return None
    gaps = {task: _gap(lines, first, second, task=task, regime=regime) for task in TASKS}
    told = ", ".join(
        f"{task} {gap:+.1f} ± {error:.1f} points" for task, (gap, error) in gaps.items()
    )
    sure = [gap > 2 * error for gap, error in gaps.values()]
    against = [gap < -2 * error for gap, error in gaps.values()]
    agrees = "yes" if all(sure) else "in part" if any(sure) else "no" if any(against) else "unclear"
    return Finding(f"less error by {told} (standard error)", agrees)


def _revived(lines: Sequence[Line]) -> Finding | None:
    if not lines:
        return None
    told, some = [], False
    for task, regime in product(TASKS, REGIMES):
        counts = [sum(x["revived"]) for x in _own(lines, method="EBD", task=task, regime=regime)]
        some = some or any(counts)
        told.append(f"{task} {regime} {min(counts)} to {max(counts)}")
    return Finding("weights that came back: " + ", ".join(told), "yes" if some else "no")


def draw(lines: Sequence[Line], folder: Path) -> list[str]:
    """Return the tables of errors and of judgements, and the figure."""
    parts = [
        "## Early Brain Damage",
        "",
        "Test error in percent by weights left, mean of 8 networks for MONK's third problem and 4 "
        'for the digits. After each removal the rest is trained on: "early" as long as the '
        'validation loss falls, "end" to the minimum.',
        "",
    ]
    for task, regime in product(TASKS, REGIMES):
        own = _own(lines, task=task, regime=regime)
        left = _own(own, method="OBD")[0]["left"]
        parts += [
            f"| {task}, {regime} | " + " | ".join(map(str, left)) + " | revived |",
            "|---" * (len(left) + 2) + "|",
        ]
        for method in METHODS:
            ways = _own(own, method=method)
            cells = [f"{fmean(way['test_error'][n] for way in ways):.1f}" for n in range(len(left))]
            back = fmean(sum(way["revived"]) for way in ways)
            parts.append(f"| {method} | " + " | ".join(cells) + f" | {back:.1f} |")
        parts.append("")
    parts += [
        "Rank correlation of the saliencies by OBD / EBD with what the removal of a weight alone "
        "adds to the training loss, with how far that is above this weight's own optimum, and with "
        "what it adds to the loss of the test cases:",
        "",
        "| network | gradient norm | added | above the optimum | added in test |",
        "|---|---|---|---|---|",
    ]
    for task, regime in product(TASKS, REGIMES):
        own = _own(lines, task=task, regime=regime, method="judged")
        cells = [
            " / ".join(
                f"{fmean(x['ranks'][name][cost] for x in own):.3f}" for name in ("OBD", "EBD")
            )
            for cost in ("increase", "over its optimum", "test")
        ]
        norm = fmean(x["gradient"] for x in own)
        parts.append(f"| {task}, {regime} | {norm:.2g} | " + " | ".join(cells) + " |")
    _figure(lines, folder / "experiments-early-brain-damage.png")
    return [
        *parts,
        "",
        "Where there is a gradient, EBD ranks better what weights cost in the training loss, as "
        "the paper says. By the test cases its ranks are no better than OBD's: it judges a weight "
        "by an optimum of the training loss that stopping early avoids. The ways down differ by "
        "less than the networks do. OBS and I-OBS, which take the whole Hessian, are ahead of OBD "
        "only at a minimum, and not surely.",
        "",
        "![test error by weights left](img/experiments-early-brain-damage.png)",
    ]


def _figure(lines: Sequence[Line], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    grid = figure.subplots(len(TASKS), len(REGIMES), sharey="row")
    for row, task in zip(grid, TASKS, strict=True):
        for axes, regime in zip(row, REGIMES, strict=True):
            for method in METHODS:
                ways = _own(lines, task=task, regime=regime, method=method)
                errors = [fmean(x) for x in zip(*(way["test_error"] for way in ways), strict=True)]
                shares = [100 * left / ways[0]["left"][0] for left in ways[0]["left"]]
                axes.plot(shares, errors, "o-", label=method, alpha=0.7, markersize=4)
            axes.set_title(f"{task}, {regime}", fontsize="medium")
            axes.set(xscale="log", xlabel="weights left, %")
            axes.invert_xaxis()
            axes.grid(alpha=0.3)
        row[0].set_ylabel("test error, %")
    grid[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=90)


_PAPER = "Tresp, Neuneier & Zimmermann, NIPS 1996"
EXPERIMENT = Experiment(
    "early_brain_damage",
    "Early Brain Damage",
    (
        Claim(_PAPER, "before the minimum OBD misjudges what a weight costs; EBD less", _misjudged),
        Claim(
            _PAPER,
            "where training is stopped early, EBD ends at less error than OBD",
            partial(_better, "EBD", "OBD", "early"),
        ),
        Claim(_PAPER, "EBD revives weights that were pruned", _revived),
        Claim(
            _PAPER,
            "that they can come back lowers the error",
            partial(_better, "EBD", "EBD, none revived", "early"),
        ),
        Claim(
            "Hassibi & Stork, NIPS 1992",
            "at a minimum OBS ends at less error than OBD",
            partial(_better, "OBS", "OBD", "end"),
        ),
    ),
    runs,
    draw,
)

if __name__ == "__main__":
    main(EXPERIMENT)
