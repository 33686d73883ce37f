"""What the sites of a report come to together."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

from iobs_onnx.report.site_report import SiteReport

# Below this the smallest eigenvalues of a Hessian are those of the sample, not of the data.
_ROWS_PER_INPUT = 4


def too_few_rows(sites: Sequence[SiteReport]) -> list[str]:
    """Say which Hessians rest on too few rows to trust: they fit noise of the calibration data."""
    few = [site for site in sites if site.rows < _ROWS_PER_INPUT * site.in_features]
    if not few:
        return []
    worst = min(few, key=lambda site: site.rows / site.in_features)
    return [
        f"{len(few)} of {len(sites)} sites saw fewer than {_ROWS_PER_INPUT} rows (tokens, patches) "
        f"an input, the least {worst.name!r}: {worst.rows} rows for {worst.in_features} inputs; "
        "calibrate on more samples"
    ]


def thin_groups(sites: Sequence[SiteReport]) -> list[str]:
    """Say which stacks of matrices hold some that few rows were dealt to."""
    return [
        f"{site.thin_groups} of {site.groups} matrices of {site.name!r} met fewer rows than they "
        f"have inputs ({site.in_features}), and rows of the kind that the others met fill their "
        "Hessians up; calibrate on more samples"
        for site in sites
        if site.thin_groups
    ]


def residuals_left_out(sites: Sequence[SiteReport]) -> list[str]:
    """Say where sites do not make up for the error of the stream that they are added to."""
    left = [site for site in sites if site.residual_left_out]
    if not left:
        return []
    return [
        f"{len(left)} of {len(sites)} sites do not make up for the error of the stream that they "
        "are added to, as that would change what they put out by more than it is: "
        + ", ".join(repr(site.name) for site in left)
    ]


def off_target(
    sites: Sequence[SiteReport], out_of_step: Sequence[str], deciding: Sequence[str]
) -> list[str]:
    """Say which sites did not aim at the dense model's output, as its rows are not the same.

    With those that decide how many rows there are, which could stay dense.
    """
    names = [site.name for site in sites if not set(site.taps).isdisjoint(out_of_step)]
    if not names:
        return []
    found = [
        f"{len(names)} of {len(sites)} sites aimed at what the dense weight makes of the pruned "
        "model's activations (target layer), not at the dense model's: the length of what they "
        f"read depends on the values, and differs between the two: {', '.join(names)}"
    ]
    if deciding:
        options = " ".join(f"--exclude {shlex.quote(name)}" for name in deciding)
        found.append(
            f"these lengths follow from {len(deciding)} of the pruned sites: to keep them, and the "
            f"dense model's target with them, {options}"
        )
    return found


def totals_of(sites: Sequence[SiteReport], declined: int, parameters: int) -> dict[str, Any]:
    """Return `totals` of `report.json`.

    Args:
        sites: those pruned.
        declined: how many candidates were.
        parameters: numbers that the dense model stores.
    """
    # A packed weight has more inputs than its tensor has bytes.
    weights = {s.initializer: s.groups * s.out_features * s.in_features for s in sites}
    zeros = sum(round(site.sparsity * weights[site.initializer]) for site in sites)
    return {
        "sites": len(sites),
        "declined": declined,
        "eligible_2_4": sum(site.eligible_2_4 for site in sites),
        "weights": sum(weights.values()),
        "zeros": zeros,
        "sparsity": zeros / sum(weights.values()),
        "parameters": parameters,
        "layer_error_geomean": geomean([site.layer_error for site in sites]),
        "nearest_error_geomean": geomean(
            [site.nearest_error for site in sites if site.nearest_error is not None]
        ),
        "error_ratio_geomean": geomean(
            [site.error_ratio for site in sites if site.error_ratio is not None]
        ),
    }


def geomean(values: Sequence[float]) -> float | None:
    """Geometric mean; None for no values, 0 where one is 0."""
    if not values:
        return None
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if min(values) > 0 else 0.0
