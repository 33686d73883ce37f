"""Spend one budget of weights where it costs the least layer error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from iobs_onnx.errors import OptionError
from iobs_onnx.hessian import Hessian, combine
from iobs_onnx.layer import solve_stacked
from iobs_onnx.passes import prepare, stored_slots
from iobs_onnx.pruning.prior.measure import keep_only, measure_once
from iobs_onnx.pruning.records import Run
from iobs_onnx.site import Site
from iobs_onnx.solvers import make_solver
from iobs_onnx.sparsity import Pattern, Unstructured

# Fractions removed at which a site's error is measured.
GRID = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
_BISECTIONS = 60


@dataclass(frozen=True)
class Allocation:
    """How much of each site is removed, and what that was decided on.

    Attributes:
        patterns: of each site.
        curves: each site's layer error at the fractions of `GRID`; empty where all sites share
            one pattern and nothing was measured.
    """

    patterns: Mapping[Site, Pattern]
    curves: Mapping[Site, Sequence[float]] = field(default_factory=dict)

    def as_list(self) -> list[dict[str, Any]]:
        """Return JSON types: for each measured site its name, fraction removed and curve."""
        return [
            {
                "site": site.name,
                "removed": 1.0 - self.patterns[site].density,
                "curve": [[x, float(y)] for x, y in zip(GRID, curve, strict=True)],
            }
            for site, curve in self.curves.items()
        ]


def allocate(run: Run) -> Allocation:
    """Return the pattern of each site: that of the options, or under `allocate error` its share.

    Then each site's layer error is measured at the fractions of `GRID`, on the dense model's
    activations, by a quick solver. The sum over the sites is then made as small as the same
    number of removed weights allows.

    Raises:
        OptionError: the fraction lies beyond those of `GRID`.
    """
    pattern = run.config.sparsity
    if run.config.allocate == "uniform":
        return Allocation(dict.fromkeys(run.sites, pattern))
    removed = 1.0 - pattern.density
    if not 0.0 < removed < GRID[-1]:
        raise OptionError(
            f"allocate error: errors are measured up to {GRID[-1]:.0%} removed, not at "
            f"{pattern}; give less, or allocate uniform"
        )
    curves = survey(run)
    sizes = np.array([site.groups * site.out_features * site.in_features for site in curves])
    fractions = spend(list(curves.values()), sizes, removed)
    shares = {s: Unstructured(float(f)) for s, f in zip(curves, fractions, strict=True)}
    return Allocation({**dict.fromkeys(run.sites, pattern), **shares}, curves)


def survey(run: Run) -> dict[Site, list[float]]:
    """Return the layer error of each site that rows reach, at the fractions of `GRID`."""
    model = prepare(run.dense, run.sites)
    stored = stored_slots(model)
    curves: dict[Site, list[float]] = {}
    for segment, hessians in measure_once(run, model, run.sites):
        for site in segment.sites:
            weight = site.to_matrices(stored[site.initializer].tensor.numpy())
            reached = [hessians[tap] for tap in site.taps if tap in hessians]
            if not reached:
                continue
            hessian = combine(reached)
            matrices = torch.from_numpy(weight).to(run.device)
            curves[site] = _curve(matrices, hessian, run.config.damping)
        keep_only(hessians, {tap for site in run.sites if site not in curves for tap in site.taps})
    return curves


def _curve(weight: torch.Tensor, hessian: Hessian, damping: float) -> list[float]:
    """Return the error of one site at the fractions of `GRID`, never falling."""
    solver = make_solver("iobs", "fast")
    errors = []
    for fraction in GRID:
        solutions = [
            solve_stacked(
                [matrix],
                second_moments,
                pattern=Unstructured(fraction),
                solver=solver,
                damping=damping,
            )[0]
            for matrix, second_moments in zip(weight, hessian.matrix, strict=True)
        ]
        energy = sum(solution.energy for solution in solutions)
        errors.append(sum(s.excess for s in solutions) / energy if energy > 0 else 0.0)
    return list(np.maximum.accumulate(errors))


def spend(
    curves: Sequence[Sequence[float]], sizes: NDArray[np.int64], removed: float
) -> NDArray[np.float64]:
    """Choose how much of each site to remove so that the sum of errors is least.

    Between points of `GRID` a curve is taken to be straight, and where it is not convex, its
    lower hull. Then the marginal error of a weight is the same at every site that is not at an
    end: one bisection on that price finds the fractions.

    Args:
        curves: errors at `GRID`, one curve a site.
        sizes: weights of each site.
        removed: the fraction of all of them to remove.

    Returns:
        Fractions whose mean, weighted by `sizes`, is `removed` to rounding.
    """
    hulls = [_lower_hull(np.array(GRID), np.array(curve)) for curve in curves]

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
    few, many = bought(low), bought(high)
    # Sites that change between the two prices are on a straight stretch at that very price.
    missing, spread = removed * sizes.sum() - few @ sizes, (many - few) @ sizes
    return few + (many - few) * (missing / spread if spread > 0 else 0.0)


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
