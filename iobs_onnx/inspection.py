"""What a model holds: every candidate weight, without running or solving anything."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir

from iobs_onnx.passes import eligibility_2_4, engines_2_4, find_sites, load_model
from iobs_onnx.site import Declined, Site


@dataclass(frozen=True)
class Inspection:
    """The sites and the declined candidates of a model, in graph order."""

    sites: tuple[Site, ...]
    declined: tuple[Declined, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types: `sites` and `declined`, each a list of objects."""
        return {
            "sites": [describe(site) for site in self.sites],
            "declined": [describe_declined(item) for item in self.declined],
        }


def inspect(model: str | os.PathLike[str] | onnx.ModelProto | ir.Model) -> Inspection:
    """Find every candidate weight of a model.

    Args:
        model: a path, an `onnx.ModelProto` or an `onnx_ir.Model`; it is not changed.

    Raises:
        ModelError: the model cannot be read.
    """
    found = find_sites(load_model(model))
    return Inspection(found.sites, found.declined)


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
