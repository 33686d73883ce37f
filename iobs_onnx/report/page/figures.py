"""The figures of the report; each takes parts of `report.json` and returns inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from iobs_onnx.report.page.drawing import ACCENT, BAD, GOOD, GRID, MUTED, PAPER, SECOND, draw

Row = Mapping[str, Any]


def layer_errors(sites: Sequence[Row], solver: str, compared: str | None) -> Markup:
    """Draw the layer error of every site by depth, and the compared solver's above or below."""
    xs = range(1, len(sites) + 1)
    own = [_shown(site["layer_error"]) for site in sites]
    others = [_shown(site["compared_error"]) for site in sites]

    def paint(axes: Axes, narrow: bool) -> None:
        size = _dot(len(sites), narrow)
        if compared:
            axes.vlines(xs, own, others, color=GRID, linewidth=max(1.0, size / 12))
            dots = axes.scatter(
                xs, others, s=size, color=PAPER, edgecolors=SECOND, linewidths=1.5, label=compared
            )
            dots.set_urls(_urls(sites))
        dots = axes.scatter(xs, own, s=size * 1.2, color=ACCENT, label=solver, zorder=3)
        dots.set_urls(_urls(sites))
        axes.set_title("Layer error by depth")
        _log_or_linear(axes, [*own, *(others if compared else [])])
        _depth(axes, len(sites))
        if compared:
            axes.legend(
                loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0, handletextpad=0.1
            )

    tips = {f"#site-{i}": _tip(site, compared) for i, site in enumerate(sites, start=1)}
    return draw("layer-error", "Layer error of each site, by depth", paint, tips=tips)


def sparsities(sites: Sequence[Row]) -> Markup:
    """Draw the share of zeros of every site by depth."""

    def paint(axes: Axes, narrow: bool) -> None:
        bars = axes.bar(
            range(1, len(sites) + 1),
            [site["sparsity"] or 0.0 for site in sites],
            width=0.72,
            color=ACCENT,
        )
        for bar, url in zip(bars, _urls(sites), strict=True):
            bar.set_url(url)
        axes.set_title("Zeros by depth")
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _depth(axes, len(sites))

    tips = {
        f"#site-{i}": f"{site['name']}\n{site['sparsity'] or 0:.2%} zeros"
        for i, site in enumerate(sites, start=1)
    }
    return draw("sparsity", "Share of zeros of each site, by depth", paint, height=190, tips=tips)


def allocation(shares: Sequence[Row], sites: Sequence[Row]) -> Markup:
    """Draw each site's error against the fraction removed, and the fraction chosen for it.

    Sites that were left dense in the end have hollow dots.
    """
    rows = {site["name"]: f"#site-{i}" for i, site in enumerate(sites, start=1)}
    links = [rows.get(share["site"]) for share in shares]
    curves = [np.array([(x, _shown(y)) for x, y in share["curve"]]) for share in shares]
    chosen = [share["removed"] for share in shares]
    # On the line as it is drawn: straight between measured points where heights are roots.
    heights = [
        np.interp(x, curve[:, 0], np.sqrt(curve[:, 1])) ** 2
        for x, curve in zip(chosen, curves, strict=True)
    ]

    def paint(axes: Axes, narrow: bool) -> None:
        for curve, link in zip(curves, links, strict=True):
            (line,) = axes.plot(*curve.T, color=ACCENT, linewidth=1.2, alpha=0.3)
            line.set_url(link)
        axes.scatter(
            chosen,
            heights,
            s=_dot(len(shares), narrow),
            color=[ACCENT if link else PAPER for link in links],
            edgecolors=ACCENT,
            linewidths=1.5,
            zorder=3,
        ).set_urls(links)
        axes.set_title("Layer error by fraction removed")
        # Low errors are where the choice is made: roots give them room, and show zero.
        axes.set_yscale("function", functions=(np.sqrt, np.square))
        axes.set_ylim(bottom=0)
        top = axes.get_ylim()[1]
        axes.set_yticks([0.0, *_round_numbers(top / 100, top)])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("weights removed")

    tips = {
        link: f"{share['site']}\n{share['removed']:.1%} removed"
        for share, link in zip(shares, links, strict=True)
        if link
    }
    label = "Layer error of each site by the fraction removed, with the one chosen"
    return draw("allocation", label, paint, height=360, tips=tips)


def ratios(sites: Sequence[Row], compared: str) -> Markup:
    """Draw the layer error as a multiple of the compared solver's, sites sorted by it."""
    known = [(i, site) for i, site in enumerate(sites, start=1) if site["error_ratio"]]
    known.sort(key=lambda pair: pair[1]["error_ratio"])
    values = [site["error_ratio"] for _, site in known]

    def paint(axes: Axes, narrow: bool) -> None:
        bars = axes.bar(
            range(1, len(known) + 1),
            [value - 1 for value in values],
            bottom=1,
            width=0.72,
            color=[GOOD if value <= 1 else BAD for value in values],
        )
        for bar, (i, _) in zip(bars, known, strict=True):
            bar.set_url(f"#site-{i}")
        axes.axhline(1, color=MUTED, linewidth=1.2)
        axes.set_title(f"Layer error ÷ that of {compared}")
        axes.set_ylim(0, max(1.15, *(1.05 * value for value in values)))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("sites, best to worst")
        axes.set_xlim(0.3, len(known) + 0.7)
        axes.set_xticks([])

    tips = {f"#site-{i}": _tip(site, compared) for i, site in known}
    return draw("ratio", f"Layer error relative to {compared}", paint, height=260, tips=tips)


def rounds(trace: Sequence[Row]) -> Markup:
    """Draw the worth of every round; those that were not accepted are hollow.

    That is the user's metric or, where a round has none, the error of the held-out outputs.
    """
    measured = "error" if any(item.get("metric") is None for item in trace) else "metric"
    numbers = [item["round"] for item in trace]
    values = [_shown(item.get(measured)) for item in trace]
    accepted = [bool(item.get("accepted")) for item in trace]

    def paint(axes: Axes, narrow: bool) -> None:
        axes.plot(numbers, values, color=GRID, linewidth=2)
        axes.scatter(
            numbers,
            values,
            s=64,
            color=[ACCENT if taken else PAPER for taken in accepted],
            edgecolors=[ACCENT if taken else MUTED for taken in accepted],
            linewidths=1.8,
            zorder=3,
        )
        for item in trace:
            if item.get("best"):
                axes.annotate(
                    "best",
                    (item["round"], _shown(item.get(measured))),
                    xytext=(0, 10),
                    textcoords="offset points",
                    ha="center",
                    color=ACCENT,
                )
        axes.set_title("Metric by round" if measured == "metric" else "Output error by round")
        axes.margins(x=0.06, y=0.22)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("round")

    return draw("rounds", "Worth of every round", paint, height=240)


def distillation(curve: Sequence[Sequence[float | None]]) -> Markup:
    """Draw the held-out loss over the steps of distillation; the least is marked.

    Args:
        curve: step, training loss and held-out loss of every check.
    """
    steps = [_shown(point[0]) for point in curve]
    losses = [_shown(point[2]) for point in curve]

    def paint(axes: Axes, narrow: bool) -> None:
        axes.plot(steps, losses, color=ACCENT, linewidth=1.8)
        axes.axhline(losses[0], color=MUTED, linewidth=1, linestyle=(0, (4, 4)))
        best = min(
            range(len(losses)), key=lambda i: float("inf") if isnan(losses[i]) else losses[i]
        )
        axes.scatter([steps[best]], [losses[best]], s=64, color=ACCENT, zorder=3)
        _log_or_linear(axes, losses)
        axes.set_title("Held-out loss by step")
        axes.set_xlabel("step")

    return draw("distillation", "Held-out loss of distillation", paint, height=240)


def runs(names: Sequence[str], reports: Sequence[Row]) -> Markup:
    """Draw the layer errors of several runs by depth, over the sites that all of them pruned."""
    errors = [{site["name"]: site["layer_error"] for site in r["sites"]} for r in reports]
    shared = [name for name in errors[0] if all(name in other for other in errors)]
    colours = (ACCENT, SECOND, GOOD, BAD, MUTED)
    markers = "osD^v"

    def paint(axes: Axes, narrow: bool) -> None:
        xs = range(1, len(shared) + 1)
        every = []
        for i, (name, found) in enumerate(zip(names, errors, strict=True)):
            values = [_shown(found[site]) for site in shared]
            every += values
            kind = markers[i // len(colours) % len(markers)]
            axes.plot(xs, values, color=colours[i % len(colours)], linewidth=1, alpha=0.35)
            axes.scatter(
                xs,
                values,
                s=_dot(len(shared), narrow),
                color=colours[i % len(colours)],
                marker=kind,
                label=name,
                zorder=3,
            ).set_urls([f"#site-{x}" for x in xs])
        axes.set_title("Layer error by depth")
        _log_or_linear(axes, every)
        _depth(axes, len(shared))
        columns = 1 if narrow else min(3, len(names))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=columns)

    tips = {
        f"#site-{i}": "\n".join(
            [
                site,
                *(
                    f"{name}: {found[site]:.4g}"
                    for name, found in zip(names, errors, strict=True)
                    if found[site] is not None
                ),
            ]
        )
        for i, site in enumerate(shared, start=1)
    }
    return draw("runs", "Layer errors of the runs, by depth", paint, height=380, tips=tips)


def _shown(value: float | None) -> float:
    return float("nan") if value is None else value


def _urls(sites: Sequence[Row]) -> list[str]:
    return [f"#site-{i}" for i in range(1, len(sites) + 1)]


def _tip(site: Row, compared: str | None) -> str:
    lines = [site["name"], f"layer error {_number(site['layer_error'])}"]
    if compared and site["error_ratio"] is not None:
        lines.append(f"{compared} {_number(site['compared_error'])} (× {site['error_ratio']:.3f})")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _dot(count: int, narrow: bool) -> float:
    """Area of a dot in points², smaller where there are many."""
    room = (300 if narrow else 900) / max(count, 1)
    return min(56.0, max(9.0, room**2 / (5 if narrow else 9)))


def _log_or_linear(axes: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic axis where every error is positive."""
    finite = [value for value in values if not isnan(value)]
    if finite and min(finite) > 0:
        axes.set_yscale("log")
        # So wide that a round number lies inside, however near the values are.
        axes.set_ylim(low := min(finite) / 1.6, high := max(finite) * 1.6)
        axes.set_yticks(_round_numbers(low, high))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)


def _round_numbers(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten in a range; only the powers in a wide one."""
    parts = (1, 2, 5) if high / low < 1000 else (1,)
    steps = [part * 10.0**power for power in range(-30, 31) for part in parts]
    return [step for step in steps if low <= step <= high]


def _depth(axes: Axes, count: int) -> None:
    axes.set_xlim(0.3, count + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
    axes.set_xlabel("site, in graph order")
