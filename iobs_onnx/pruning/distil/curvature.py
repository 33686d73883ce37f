"""How much the loss rises to second order where a model leaves the dense one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from iobs_onnx.pruning.distil.losses import Target, compared, valid_rows


def root(
    targets: Sequence[Target],
    dense: Mapping[str, Tensor],
    mask: Tensor | None,
    random: torch.Generator,
) -> Tensor:
    """Return a random root of the Gauss-Newton approximation of :func:`losses.distance`.

    A scalar `φ` whose derivatives, squared, are in expectation the loss: where weights change by
    `ΔW`, `E⟨∇φ, ΔW⟩² = ½ ⟨ΔW, G ΔW⟩`, with `G` the Gauss-Newton matrix of the loss at the dense
    model, the Fisher matrix where the loss is KL. Cotangents are normal, with the covariance of the
    loss in the outputs: labels drawn from the model would give the same mean with many times the
    variance, as models are mostly sure.

    Args:
        targets, mask: as for :func:`losses.distance`.
        dense: value name to what the dense model gives on one feed, with its graph.
        random: draws the cotangents.
    """
    roots = []
    for target in targets:
        output = dense[target.value]
        if target.kind == "kl":
            moved = output.movedim(target.axis, -1)
            roots.append(_logits(moved, valid_rows(output, mask), random))
        else:
            roots.append(_vectors(compared(target.kind, output.float(), mask), random))
    return torch.stack(roots).sum() / len(roots) ** 0.5


def _logits(logits: Tensor, valid: Tensor | None, random: torch.Generator) -> Tensor:
    """KL in nats, mean over rows: `½ Δᵀ (diag p − p pᵀ) Δ` each, `p` the probabilities."""
    rows = logits if valid is None else logits[valid]
    rows = rows.reshape(-1, rows.shape[-1]).float()
    p = torch.softmax(rows.detach(), -1)
    cotangents = p.sqrt() * _normal(p, random)
    cotangents -= p * cotangents.sum(-1, keepdim=True)
    return (cotangents * rows).sum() / (2 * len(rows)) ** 0.5


def _vectors(terms: Sequence[Tensor], random: torch.Generator) -> Tensor:
    """Mean over terms of `‖Δ‖² / ‖dense‖²`."""
    found = [
        (_normal(term, random) * term).sum() / term.detach().norm().clamp(min=1e-6)
        for term in terms
    ]
    return torch.stack(found).sum() / len(found) ** 0.5


def _normal(like: Tensor, random: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=random)
