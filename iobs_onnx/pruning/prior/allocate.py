"""Spend one budget of weights where it costs least: in layer error, or in the model's loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from iobs_onnx.errors import OptionError
from iobs_onnx.hessian import Hessian, combine
from iobs_onnx.layer import solve_stacked
from iobs_onnx.passes import prepare, stored_slots
from iobs_onnx.pruning.prior.loss import ModelLoss
from iobs_onnx.pruning.prior.measure import keep_only, measure_once
from iobs_onnx.pruning.records import Run
from iobs_onnx.site import Site
from iobs_onnx.solvers import make_solver
from iobs_onnx.sparsity import Pattern, Unstructured

# Fractions removed at which a site's error is measured.
GRID = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
# Those at which its cost in the model's loss is: each takes a copy of the site's weights.
PROBES = (0.5, 0.7, 0.9)
# How far a site's fraction may lie from that of all. Costs are those of one site beside dense ones,
# to second order: further off, neither holds.
REACH = 0.15
_STEPS = 60
_BISECTIONS = 60


@dataclass(frozen=True)
class Allocation:
    """How much of each site is removed, and what that was decided on.

    Attributes:
        patterns: of each site.
        curves: each site's layer error at the fractions of `grid`; empty where all sites share
            one pattern.
        grid: fractions removed.
        prices: what a layer error of 1 of each site costs in the model's loss, under `allocate
            loss`.
    """

    patterns: Mapping[Site, Pattern]
    curves: Mapping[Site, Sequence[float]] = field(default_factory=dict)
    grid: Sequence[float] = GRID
    prices: Mapping[Site, float] = field(default_factory=dict)

    def as_list(self) -> list[dict[str, Any]]:
        """Return JSON types: for each measured site its name, fraction removed and curve."""
        return [
            {
                "site": site.name,
                "removed": 1.0 - self.patterns[site].density,
                "curve": [[x, float(y)] for x, y in zip(self.grid, curve, strict=True)],
                "price": self.prices.get(site),
                "predicted_loss": self._predicted(site),
            }
            for site, curve in self.curves.items()
        ]

    def _predicted(self, site: Site) -> float | None:
        if site not in self.prices:
            return None
        removed, curve = 1.0 - self.patterns[site].density, self.curves[site]
        if removed in self.grid:
            return self.prices[site] * float(curve[list(self.grid).index(removed)])
        return self.prices[site] * float(between(curve, np.array([removed]))[0])


def allocate(run: Run) -> Allocation:
    """Return the pattern of each site: that of the options, or its share.

    Under `allocate error` each site's layer error is measured at the fractions of `GRID`, on the
    dense model's activations, by a quick solver. The sum over the sites is then made as small as
    the same number of removed weights allows. Under `allocate loss` each site's error is weighed by
    what it costs in the model's loss (:class:`ModelLoss`), and fractions keep within `REACH` of
    that of all. Where N:M patterns are named to choose from, each site gets one of them, and at
    least as much goes. A single N:M pattern stays that of every site: costs then say only which
    sites go back to dense first.

    Raises:
        OptionError: the fraction lies beyond those of `GRID`.
        ModelError: under `allocate loss`, the model has no gradient.
    """
    pattern, how = run.config.sparsity, run.config.allocate
    same = dict.fromkeys(run.sites, pattern)
    if how == "uniform":
        return Allocation(same)
    removed = 1.0 - pattern.density
    free = isinstance(pattern, Unstructured)
    if free and not 0.0 < removed < GRID[-1]:
        raise OptionError(
            f"allocate {how}: errors are measured up to {GRID[-1]:.0%} removed, not at "
            f"{pattern}; give less, or allocate uniform"
        )
    loss = ModelLoss.of(run) if how == "loss" else None
    if run.config.patterns:
        return _choose(run, loss)
    trials = [Unstructured(fraction) for fraction in GRID] if free else [pattern]
    probes = [GRID.index(fraction) for fraction in PROBES] if free else [0]
    curves, costs = _surveyed(run, trials, probes, loss)
    if not curves:  # all of them are in bodies that never ran, which the walk refuses
        return Allocation(same)
    prices = {s: _price(cost, np.array(curves[s])[probes]) for s, cost in costs.items()}
    if not free:
        return Allocation(same, prices=prices)
    sizes = _sizes(curves)
    if loss is None:
        fractions = spend(list(curves.values()), sizes, removed)
    else:
        grid = np.linspace(max(0.0, removed - REACH), min(GRID[-1], removed + REACH), _STEPS + 1)
        priced = [prices[site] * between(curve, grid) for site, curve in curves.items()]
        fractions = spend(priced, sizes, removed, grid)
    shares = {s: Unstructured(float(f)) for s, f in zip(curves, fractions, strict=True)}
    return Allocation({**same, **shares}, curves, prices=prices)


def _choose(run: Run, loss: ModelLoss | None) -> Allocation:
    """Give each site one of several N:M patterns: least error, or loss, for the fraction asked."""
    patterns = sorted(run.config.patterns, key=lambda pattern: -pattern.density)
    grid = [1.0 - pattern.density for pattern in patterns]
    curves, costs = _surveyed(run, patterns, range(len(patterns)), loss)
    # A site that no row reaches is not pruned; it gets the mildest.
    mildest: dict[Site, Pattern] = dict.fromkeys(run.sites, patterns[0])
    if not curves:
        return Allocation(mildest)
    weighed = [np.maximum.accumulate(costs[site]) for site in curves] if costs else curves.values()
    indices = pick(list(weighed), _sizes(curves), 1.0 - run.config.sparsity.density, grid)
    chosen = {site: patterns[index] for site, index in zip(curves, indices, strict=True)}
    prices = {s: _price(cost, np.array(curves[s])) for s, cost in costs.items()}
    return Allocation({**mildest, **chosen}, curves, grid, prices)


def _surveyed(
    run: Run, trials: Sequence[Pattern], probes: Sequence[int], loss: ModelLoss | None
) -> tuple[dict[Site, list[float]], dict[Site, NDArray[np.float64]]]:
    """Return sites' errors under the trials, and what those of the probes cost in the loss."""
    curves, changes = dict[Site, list[float]](), dict[Site, NDArray[np.float32]]()
    for site, errors, moves in survey(run, trials, [] if loss is None else probes):
        curves[site] = list(np.maximum.accumulate(errors))
        changes[site] = moves
    return curves, {} if loss is None or not curves else loss.costs(changes)


def _sizes(sites: Iterable[Site]) -> NDArray[np.int64]:
    return np.array([site.groups * site.out_features * site.in_features for site in sites])


def _price(costs: NDArray[np.float64], errors: NDArray[np.float64]) -> float:
    """Return the loss for an error of 1: the geometric mean over the trials, 0 where one is 0."""
    if not (costs > 0).all() or not (errors > 0).all():
        return 0.0
    return float(np.exp(np.log(costs / errors).mean()))


def between(curve: Sequence[float], fractions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return errors between the fractions of `GRID`: exponential, and quadratic below the first."""
    xs, ys = np.array(GRID[1:]), np.maximum(curve[1:], np.finfo(float).tiny)
    small = np.minimum(fractions / xs[0], 1.0) ** 2
    return small * np.exp(np.interp(fractions, xs, np.log(ys)))


def survey(
    run: Run, patterns: Sequence[Pattern], probes: Sequence[int]
) -> Iterator[tuple[Site, list[float], NDArray[np.float32]]]:
    """Yield each site that rows reach, with its layer error under patterns.

    Args:
        run: whose feeds are read once.
        patterns: to try, each on the dense model's activations by a quick solver.
        probes: indices of the patterns whose changes of the weights are yielded too.

    Yields:
        The site, its errors, and `ΔW` for each probe, `(probes, *stored shape)`, in the numbers
        that are stored.
    """
    model = prepare(run.dense, run.sites)
    stored = stored_slots(model)
    done: set[Site] = set()
    for segment, hessians in measure_once(run, model, run.sites):
        for site in segment.sites:
            tensor = stored[site.initializer].tensor.numpy()
            reached = [hessians[tap] for tap in site.taps if tap in hessians]
            if not reached:
                continue
            done.add(site)
            hessian = combine(reached)
            weight = torch.from_numpy(site.to_matrices(tensor)).to(run.device)
            tried = [_tried(weight, hessian, item, run.config.damping) for item in patterns]
            moves = [
                site.to_stored(tried[index][1], tensor.dtype).astype(np.float32)
                - tensor.astype(np.float32)
                for index in probes
            ]
            yield site, [error for error, _ in tried], np.array(moves)
        keep_only(hessians, {tap for site in run.sites if site not in done for tap in site.taps})


def _tried(
    weight: torch.Tensor, hessian: Hessian, pattern: Pattern, damping: float
) -> tuple[float, NDArray[np.float32]]:
    """Return the error of one site under a pattern, and its matrices."""
    solver = make_solver("iobs", "fast")
    solutions = [
        solve_stacked([matrix], moments, pattern=pattern, solver=solver, damping=damping)[0]
        for matrix, moments in zip(weight, hessian.matrix, strict=True)
    ]
    energy = sum(solution.energy for solution in solutions)
    error = sum(s.excess for s in solutions) / energy if energy > 0 else 0.0
    return error, torch.stack([solution.weight for solution in solutions]).cpu().numpy()


def spend(
    curves: Sequence[Sequence[float] | NDArray[np.float64]],
    sizes: NDArray[np.int64],
    removed: float,
    grid: Sequence[float] | NDArray[np.float64] = GRID,
) -> NDArray[np.float64]:
    """Choose how much of each site to remove so that the sum of errors is least.

    Between points of the grid a curve is taken to be straight, and where it is not convex, its
    lower hull. Then the marginal error of a weight is the same at every site that is not at an
    end: one bisection on that price finds the fractions.

    Args:
        curves: errors at the points of the grid, one curve a site.
        sizes: weights of each site.
        removed: the fraction of all of them to remove.
        grid: fractions, rising.

    Returns:
        Fractions whose mean, weighted by `sizes`, is `removed` to rounding.
    """
    few, many = _around(curves, sizes, removed, grid)
    # Sites that change between the two prices are on a straight stretch at that very price.
    missing, spread = removed * sizes.sum() - few @ sizes, (many - few) @ sizes
    return few + (many - few) * (missing / spread if spread > 0 else 0.0)


def pick(
    curves: Sequence[Sequence[float] | NDArray[np.float64]],
    sizes: NDArray[np.int64],
    removed: float,
    grid: Sequence[float],
) -> list[int]:
    """Choose a point of the grid for each site, so that at least `removed` goes at little error.

    As :func:`spend`; of the sites that change at the last price, as many stay at the milder point
    as the fraction allows, the largest first.

    Args:
        curves, sizes, removed, grid: as there.

    Returns:
        Indices into `grid`, one a site.
    """
    few, many = _around(curves, sizes, removed, grid)
    taken, spare = many.copy(), many @ sizes - removed * sizes.sum()
    for index in np.argsort(-(many - few) * sizes, kind="stable"):
        given_back = (many[index] - few[index]) * sizes[index]
        if 0 < given_back <= spare * (1 + 1e-9):
            taken[index], spare = few[index], spare - given_back
    return [list(grid).index(fraction) for fraction in taken]


def _around(
    curves: Sequence[Sequence[float] | NDArray[np.float64]],
    sizes: NDArray[np.int64],
    removed: float,
    grid: Sequence[float] | NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points of the grid just below and just above the price that removes the fraction."""
    hulls = [_lower_hull(np.array(grid), np.array(curve)) for curve in curves]

    def bought(price: float) -> NDArray[np.float64]:
        taken = []
        for (xs, ys), size in zip(hulls, sizes, strict=True):
            slopes = np.diff(ys) / np.diff(xs) / size
            taken.append(xs[int((slopes <= price).sum())])
        return np.array(taken)

    low, high = 0.0, max(float((np.diff(y) / np.diff(x)).max()) for x, y in hulls) / sizes.min()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if bought(middle) @ sizes < removed * sizes.sum():
            low = middle
        else:
            high = middle
    return bought(low), bought(high)


def _lower_hull(
    xs: NDArray[np.float64], ys: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the corners of the greatest convex function below the points."""
    hull: list[tuple[float, float]] = []
    for x, y in zip(xs, ys, strict=True):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) <= (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((float(x), float(y)))
    return np.array([x for x, _ in hull]), np.array([y for _, y in hull])
