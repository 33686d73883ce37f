"""Hold a sparse model to what it claims: its pattern, finite outputs, nearness to the dense one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir

from iobs_onnx.config import PruneConfig, make_config
from iobs_onnx.errors import OptionError
from iobs_onnx.inspection import describe_declined
from iobs_onnx.passes import (
    achieved_sparsity,
    check_model,
    check_pattern,
    eligibility_2_4,
    find_sites,
    load_model,
    scratch,
    stored_slots,
    unknown_to_checker,
)
from iobs_onnx.pruning.selection import select
from iobs_onnx.site import Declined
from iobs_onnx.sparsity import NM, Pattern, parse_sparsity

Model = str | os.PathLike[str] | onnx.ModelProto | ir.Model


@dataclass(frozen=True)
class VerifiedSite:
    """One weight of the model under test.

    Attributes:
        sparsity: fraction of zeros.
        holds_2_4: whether 2:4 holds along the deployment axis; None where it cannot.
        violations: groups (N:M) or weights (unstructured) beyond the claimed pattern; None
            where no pattern is claimed.
        finite: whether all its values are finite.
    """

    name: str
    initializer: str
    shape: list[int]
    sparsity: float
    holds_2_4: bool | None
    violations: int | None
    finite: bool


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify`.

    Attributes:
        pattern: what was claimed, None if nothing was.
        sites: the weights that were looked at.
        declined: candidates that were not, and why.
        outputs: for each float output, how near the sparse model is to the dense one; with data
            but no dense model, relative error and cosine are None; empty without data.
        failures: one line for each thing that does not hold.
        notes: what could not be checked, and why.
    """

    pattern: str | None
    sites: list[VerifiedSite]
    declined: list[Declined]
    outputs: list[dict[str, Any]]
    failures: list[str]
    notes: list[str]

    @property
    def ok(self) -> bool:
        """Whether everything claimed holds."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "ok": self.ok,
            "pattern": self.pattern,
            "sites": [dataclasses.asdict(site) for site in self.sites],
            "declined": [describe_declined(item) for item in self.declined],
            "outputs": self.outputs,
            "failures": self.failures,
            "notes": self.notes,
        }


def verify(
    sparse: Model,
    *,
    sparsity: str | float | Pattern | None = None,
    dense: Model | None = None,
    data: Any = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    provider: Literal["auto", "cpu", "cuda"] = "auto",
    **options: Any,
) -> Verification:
    """Check a sparse model.

    Args:
        sparse: the model under test.
        sparsity: the pattern that every site which can carry it must hold; without one, the
            sparsity found is only reported.
        dense: the model it was made from; its outputs are compared, which needs `data`.
        data: feeds, in any form that :func:`iobs_onnx.prune` takes; all are run.
        include, exclude: globs on site names that narrow the claim.
        provider: where ONNX Runtime runs the models.
        options: those of :class:`iobs_onnx.config.PruneConfig` that read data: `text` and the like.

    Raises:
        InputError: a model, the data or an option is at fault.
        CheckError: onnx.checker refuses the model, and for another reason than that it does not
            know an operator of ONNX Runtime.
    """
    given = data is not None or any(options.get(name) for name in ("text", "images", "audio"))
    if dense is not None and not given:
        raise OptionError("dense: comparing outputs needs data; give feeds to run both models on")
    if options and not given:
        raise OptionError(f"{next(iter(options))}: says how data are read; give data")
    pattern = None if sparsity is None else parse_sparsity(sparsity)
    model = load_model(sparse)
    unknown = unknown_to_checker(model)
    if not unknown:
        check_model(model if isinstance(sparse, onnx.ModelProto | ir.Model) else sparse)
    # 1:1 fits every site: without a claim all are looked at.
    chosen = select(find_sites(model), [pattern or NM(1, 1)], include, exclude)
    claims = {} if pattern is None else {site.name: pattern for site in chosen.sites}
    broken = {item.site: item for item in check_pattern(model, chosen.sites, claims)}
    can_2_4 = [site for site in chosen.sites if eligibility_2_4(site)[0]]
    not_2_4 = {
        item.site for item in check_pattern(model, can_2_4, {s.name: NM(2, 4) for s in can_2_4})
    }
    stored = stored_slots(model)
    sites = []
    for site in chosen.sites:
        array = site.to_matrices(stored[site.initializer].tensor.numpy())
        sites.append(
            VerifiedSite(
                site.name,
                site.initializer,
                list(site.shape),
                achieved_sparsity(array),
                site.name not in not_2_4 if site in can_2_4 else None,
                None if pattern is None else broken[site.name].count if site.name in broken else 0,
                bool(np.isfinite(array).all()),
            )
        )
    failures = [item.text for item in broken.values()]
    failures += [
        f"{site.name}: weight {site.initializer!r} holds NaN or Inf"
        for site in sites
        if not site.finite
    ]
    if pattern is not None and not sites:
        failures.append(f"no weight of the model can carry {pattern}")
    outputs = []
    if given:
        config = make_config({"sparsity": "2:4", **options, "provider": provider})
        outputs = _outputs(dense, model, sparse, data, config)
    failures += [
        f"output {out['name']!r} is not finite" + (f" ({out['note']})" if out["note"] else "")
        for out in outputs
        if not out["finite"]
    ]
    return Verification(
        None if pattern is None else str(pattern),
        sites,
        list(chosen.declined),
        outputs,
        failures,
        [f"onnx.checker was not asked: it does not know {', '.join(unknown)}"] * bool(unknown),
    )


def _outputs(
    dense: Model | None, sparse: ir.Model, path: Model, data: Any, config: PruneConfig
) -> list[dict[str, Any]]:
    from iobs_onnx.engine import Engine, compare, default_memory_budget
    from iobs_onnx.pruning.sources import calibration_sources, open_sources
    from iobs_onnx.runtime import find_device, input_specs

    inputs = input_specs(sparse)
    sources = calibration_sources(data, config, sparse, path, inputs)
    feeds = open_sources(sources, None, inputs, config, judge=False).calibration
    reference = sparse if dense is None else load_model(dense)
    with scratch() as folder:
        device = find_device(config.device)
        engine = Engine(config.provider, default_memory_budget(), folder, device=device)
        found = [dataclasses.asdict(item) for item in compare(reference, sparse, feeds, engine)]
    if dense is None:
        return [{**item, "relative_error": None, "cosine": None} for item in found]
    return found
