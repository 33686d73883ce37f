"""What a model holds: every candidate weight, without running or solving anything."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

from iobs_onnx.passes import (
    Sequential,
    eligibility_2_4,
    engines_2_4,
    find_others,
    find_sites,
    load_model,
    partition,
    prepare,
)
from iobs_onnx.site import Declined, Other, Site


@dataclass(frozen=True)
class Inspection:
    """All that a model stores: sites, declined candidates, and what is no candidate."""

    sites: tuple[Site, ...]
    declined: tuple[Declined, ...]
    others: tuple[Other, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types: `sites`, `declined` and `others`, each a list of objects."""
        return {
            "sites": [describe(site) for site in self.sites],
            "declined": [describe_declined(item) for item in self.declined],
            "others": [dataclasses.asdict(item) for item in self.others],
        }


def inspect(model: str | os.PathLike[str] | onnx.ModelProto | ir.Model) -> Inspection:
    """Find every candidate weight of a model, and name what else it stores.

    Args:
        model: a path, an `onnx.ModelProto` or an `onnx_ir.Model`; it is not changed.

    Raises:
        ModelError: the model cannot be read.
    """
    own = load_model(model)
    found = find_sites(own)
    return Inspection(found.sites, found.declined, find_others(own, found))


def inspect_segments(
    model: str | os.PathLike[str] | onnx.ModelProto | ir.Model,
    *,
    sequential: Sequential = "site",
    memory_budget: int | None = None,
) -> list[dict[str, Any]]:
    """Return the segments in which a model is walked, first to last, as JSON types.

    Args:
        model: as for :func:`inspect`.
        sequential: as for :func:`iobs_onnx.prune`.
        memory_budget: bytes of weights and Hessians in a segment; None for no bound.

    Returns:
        For each its `nodes`, `weight_bytes`, `inputs` and `outputs` (the tensors that pass its two
        ends), `taps`, and the names of the `sites` solved in it.

    Raises:
        ModelError: the model cannot be read.
    """
    own = load_model(model)
    sites = find_sites(own).sites
    working = prepare(own, sites)
    return [
        {
            "nodes": segment.nodes,
            "weight_bytes": segment.weight_bytes,
            "inputs": list(segment.inputs),
            "outputs": list(segment.outputs),
            "taps": [tap.label for tap in segment.taps],
            "sites": [site.name for site in segment.sites],
        }
        for segment in partition(working, sites, sequential=sequential, budget=memory_budget)
    ]


def describe(site: Site) -> dict[str, Any]:
    """Return a site as JSON types, as `inspect --json` and the report show it."""
    eligible, rule = eligibility_2_4(site)
    return {
        "name": site.name,
        "nodes": list(site.nodes),
        "op_type": site.op_type,
        "initializer": site.initializer,
        "shape": list(site.shape),
        "dtype": site.dtype,
        "axis": site.axis,
        "groups": site.groups,
        "out_features": site.out_features,
        "in_features": site.in_features,
        "taps": [tap.label for tap in site.taps],
        "eligible_2_4": eligible,
        "eligibility_rule": rule,
        "engines": [dataclasses.asdict(engine) for engine in engines_2_4(site)],
    }


def describe_declined(item: Declined) -> dict[str, Any]:
    """Return a declined candidate as JSON types."""
    return {
        "name": item.name,
        "nodes": list(item.nodes),
        "op_type": item.op_type,
        "initializer": item.initializer,
        "shape": list(item.shape),
        "reason": item.reason,
    }
