"""Check what was written, independently of how it was made."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.errors import CheckError, OptionError
from iobs_onnx.passes.files.folders import scratch
from iobs_onnx.passes.files.load_save import save_model
from iobs_onnx.passes.graph.tensors import all_nodes, release, stored_slots
from iobs_onnx.site import Site
from iobs_onnx.sparsity import NM, Pattern

# Operators that ONNX Runtime registers among ONNX's own.
_OF_ONNX_RUNTIME = frozenset({"SimplifiedLayerNormalization"})


@dataclass(frozen=True)
class Violation:
    """A site whose stored tensor does not hold its pattern.

    Attributes:
        site, initializer: the site's name and that of its tensor.
        pattern: the pattern as text, `2:4`.
        count: groups with too many non-zeros (N:M), or non-zeros too many (unstructured).
        text: one line for a reader.
    """

    site: str
    initializer: str
    pattern: str
    count: int
    text: str


def check_pattern(
    model: ir.Model, sites: Iterable[Site], patterns: Mapping[str, Pattern]
) -> list[Violation]:
    """Hold each stored tensor against its pattern along the axis that deployment groups.

    Args:
        model: the model as written; its tensors are read one at a time.
        sites: sites of that model; those without a pattern are not looked at.
        patterns: site name to pattern.

    Raises:
        OptionError: a pattern names no site.
        CheckError: a site's tensor is not in the model or has another shape.
    """
    by_name = {site.name: site for site in sites}
    stored = stored_slots(model)
    violations = []
    for name, pattern in patterns.items():
        if name not in by_name:
            raise OptionError(f"pattern {pattern} for {name!r}: the model has no such site")
        site = by_name[name]
        slot = stored.get(site.initializer)
        if slot is None or tuple(slot.tensor.shape.numpy()) != site.shape:
            raise CheckError(
                f"site {name!r}: the model stores no tensor {site.initializer!r} of shape "
                f"{site.shape}; find the sites of the model that is checked"
            )
        count, text = _count(slot.tensor.numpy(), site, pattern)
        release(model, [site.initializer])
        if count:
            text = f"{name}: tensor {site.initializer!r} is not {pattern}: {text}"
            violations.append(Violation(name, site.initializer, str(pattern), count, text))
    return violations


def achieved_sparsity(array: NDArray[np.generic]) -> float:
    """Return the fraction of exact zeros in an array of any shape; 0 for an empty one."""
    return 1.0 - np.count_nonzero(array) / array.size if array.size else 0.0


def check_model(model: ir.Model | str | os.PathLike[str]) -> None:
    """Run onnx.checker on a file, or on a model as it would be written.

    Raises:
        CheckError: the checker's first complaint.
    """
    if isinstance(model, ir.Model):
        # The checker takes models above 2 GB and external data only from a file.
        with scratch() as folder:
            file = folder / "model.onnx"
            save_model(model, file)
            _run_checker(file, f"model {model.graph.name!r}")
        return
    _run_checker(model, f"model {os.fspath(model)}")


def unknown_to_checker(model: ir.Model) -> list[str]:
    """Return the operators of ONNX Runtime that a model counts among ONNX's own, as exporters do.

    onnx.checker refuses every model that holds one, and says nothing of the rest of it.
    """
    names = {node.op_type for node in all_nodes(model) if node.domain == ""}
    return sorted(names & _OF_ONNX_RUNTIME)


def _run_checker(file: str | os.PathLike[str], label: str) -> None:
    try:
        onnx.checker.check_model(os.fspath(file))
    except onnx.checker.ValidationError as error:
        complaint = str(error).strip().splitlines()[0]
        raise CheckError(f"{label}: onnx.checker refuses it: {complaint}") from error


def _count(stored: NDArray[np.generic], site: Site, pattern: Pattern) -> tuple[int, str]:
    matrices = site.to_matrices(stored)
    if isinstance(pattern, NM):
        runs = matrices.reshape(-1, site.run)
        if misfit := pattern.misfit(site.run):
            return len(runs), misfit
        count = pattern.violations(runs)
        return count, f"{count} groups along axis {site.axis} hold over {pattern.n} non-zeros"
    count = sum(pattern.violations(matrix) for matrix in matrices)
    return count, f"{count} non-zeros too many"
