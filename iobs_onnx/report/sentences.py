"""What became of the model besides its zeros, in sentences that the terminal and the page share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iobs_onnx.report.totals import geomean

Report = Mapping[str, Any]


def outcome(report: Report) -> list[str]:
    """Return a sentence each on distillation, rounding, sizes and the order of channels.

    There is none where there is nothing to say.

    Args:
        report: the content of `report.json`.
    """
    return [*_distillation(report), *_rounding(report), *_sizes(report), *_order(report)]


def _distillation(report: Report) -> list[str]:
    found = report.get("distillation")
    if found is None:
        return []
    lines = _blocks(found.get("blocks"))
    if "steps" not in found:
        return [*lines, *found.get("notes", ())]
    lines += [
        f"distilled for {found['steps']} steps: held-out loss {found['before']:.4g} before, "
        f"{found['after']:.4g} after"
        + ("" if found["accepted"] else "; not taken, the weights are those of pruning")
    ]
    return [*lines, *found["notes"]]


def _blocks(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    taken = sum(block["accepted"] for block in found["each"])
    line = (
        f"distilled block by block for {found['steps']} steps: {taken} of {len(found['each'])} "
        f"blocks came nearer; held-out loss of the outputs {found['before']:.4g} before, "
        f"{found['after']:.4g} after"
    )
    end = "" if found["accepted"] else "; not taken, the weights are those of pruning"
    return [line + end, *found["notes"]]


def _rounding(report: Report) -> list[str]:
    totals = report["totals"]
    nearest = totals.get("nearest_error_geomean")
    if nearest is None:
        return []
    count = sum(site["quantized"] == "int8" for site in report["sites"])
    return [
        f"{count} weights are int8, and the layer errors include that; had they been rounded to "
        f"the nearest, the geometric mean would be {nearest:.4g} instead of "
        f"{totals['layer_error_geomean']:.4g}"
    ]


def _sizes(report: Report) -> list[str]:
    """Say how large the files are, and what a form other than the dense one brought."""
    model, out = report["model"], report["output"]
    if out.get("bytes") is None:
        return []
    text = f"written as {out['form']}: {out['bytes']:,} bytes, {out['zstd_bytes']:,} with zstd"
    if model.get("bytes") is not None:
        text += f"; the dense model takes {model['bytes']:,}, {model['zstd_bytes']:,} with zstd"
    lines = [text]
    if model.get("bytes") is not None:
        grown = {"": "bytes", " with zstd": "zstd_bytes"}
        more = [
            f"{out[key] / model[key] - 1:.1%}{how}"
            for how, key in grown.items()
            if out[key] > model[key]
        ]
        if more:
            lines.append(f"what is written is larger than the dense model: by {', '.join(more)}")
    if out.get("beside"):
        lines.append(f"copied beside it: {', '.join(out['beside'])}")
    if out["left_dense"]:
        lines.append(f"{len(out['left_dense'])} tensors stay dense: report.json says why")
    if out["refused"]:
        lines.append(f"ONNX Runtime does not load this form: {out['refused']}")
    return lines


def _order(report: Report) -> list[str]:
    permutations = report.get("permutations") or []
    if not permutations:
        return []
    taken = [item for item in permutations if item["taken"]]
    gain = geomean([item["after"] / item["before"] for item in taken])
    return [
        f"{len(taken)} set{'s' * (len(taken) != 1)} of channels put in another order"
        + ("" if gain is None else f": {gain:.3f} × the layer error of their readers")
    ]
