"""Sparsity and int8 together: round what a solver kept, and let the kept weights make up for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from iobs_onnx.errors import CheckError
from iobs_onnx.hessian import Hessian, exact_float32
from iobs_onnx.layer import Solution, absolute_damping
from iobs_onnx.passes import Codes, channel_axis, check_pattern, find_sites, store_as_integers
from iobs_onnx.site import Site
from iobs_onnx.solvers.rounding import Rounded, nearest, round_compensated, steps
from iobs_onnx.sparsity import Pattern


@exact_float32()
def round_site(
    site: Site,
    solved: Sequence[Solution[torch.Tensor]],
    aim: torch.Tensor,
    hessian: Hessian,
    damping: float,
    dtype: np.dtype[np.generic],
) -> tuple[Codes, Codes]:
    """Round a solved site to int8, one symmetric grid an output.

    Args:
        site: whose outputs lie on one stored axis.
        solved: of each group.
        aim: what the weights should come near, `(groups, out, in)`.
        hessian: of the site.
        damping: λ as a fraction of the mean of each diagonal.
        dtype: of the stored weight, which the scales take.

    Returns:
        The integers, compensated, and those of rounding each weight to the nearest.
    """
    compensated, plain = [], []
    for solution, target, matrix in zip(solved, aim, hessian.matrix, strict=True):
        damped = matrix.clone()
        damped.diagonal().add_(absolute_damping(damping, matrix))
        step = _stored(steps(solution.weight), dtype)
        plain.append(nearest(solution.weight, step))
        compensated.append(round_compensated(solution.weight, solution.mask, target, damped, step))
    return _codes(site, compensated, dtype), _codes(site, plain, dtype)


def _stored(step: torch.Tensor, dtype: np.dtype[np.generic]) -> torch.Tensor:
    """Round steps as they will be stored; none of them to zero."""
    rounded = step.cpu().numpy().astype(dtype).astype(np.float32)
    return torch.from_numpy(np.where(rounded > 0, rounded, 1)).to(step)


def _codes(site: Site, groups: Sequence[Rounded], dtype: np.dtype[np.generic]) -> Codes:
    found = channel_axis(site)
    assert found is not None, "sites without a channel axis are not rounded"
    axis, outputs = found
    integers = torch.stack([group.codes for group in groups]).cpu().numpy()
    scale = torch.cat([group.step for group in groups]).cpu().numpy()[outputs].astype(dtype)
    values = site.to_stored(integers.astype(np.float32), np.dtype(np.int8))
    return Codes(values.astype(np.int8, copy=False), scale, axis)


def store_quantized(
    model: ir.Model, codes: Mapping[Site, Codes | None], patterns: Sequence[Pattern]
) -> tuple[Site, ...]:
    """Store the weights that were rounded as integers, in place, and hold these to their patterns.

    Args:
        model: the pruned one.
        codes: of each site; None where it was not rounded.
        patterns: of the sites, in their order.

    Returns:
        The sites of the model as it is now, in the order of `codes`.

    Raises:
        CheckError: a weight is not found again, or its integers do not hold the pattern.
    """
    rounded = {site.initializer: item for site, item in codes.items() if item is not None}
    if not rounded:
        return tuple(codes)
    renamed = store_as_integers(model, rounded)
    stored = {site.initializer: site for site in find_sites(model).sites}
    again = []
    for site in codes:
        found = stored.get(renamed.get(site.initializer, site.initializer))
        if found is None or found.in_features != site.in_features:
            raise CheckError(f"weight {site.initializer!r}: not found again behind its scale")
        again.append(found)
    if violations := check_pattern(
        model, again, {s.name: p for s, p in zip(again, patterns, strict=True)}
    ):
        raise CheckError(violations[0].text)
    return tuple(again)
