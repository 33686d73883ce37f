"""What an output is, and how far the sparse model's lies from the dense model's."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import onnx_ir as ir
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from iobs_onnx.errors import ModelError
from iobs_onnx.passes import find_token_input, moving_lengths
from iobs_onnx.pruning.distil.settings import Loss
from iobs_onnx.runtime import find_padding

Kind: TypeAlias = Literal["kl", "mse", "embedding"]

# Caches of keys and values leave beside the outputs; they follow from the same activations.
_CACHE = re.compile(r"^(present|past)")
_LOGITS = re.compile(r"logit|score|prob|label", re.IGNORECASE)
_VECTORS = re.compile(r"hidden|embed|feature|pool", re.IGNORECASE)
_SOFTMAX = ("Softmax", "LogSoftmax")
# Elements of logits at a time: a few rows of a large vocabulary, in a core's cache and no more.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Target:
    """An output that is matched.

    Attributes:
        output: name of the model's output.
        value: what is compared: the output, or the logits in front of its softmax.
        kind: of loss.
        axis: of the classes, for `kl`.
        padded: whether the padding mask is for it, where its first axes are as long.
    """

    output: str
    value: str
    kind: Kind
    axis: int = -1
    padded: bool = True


def find_targets(model: ir.Model, loss: Loss = "auto") -> list[Target]:
    """Return the outputs to match, each with its loss.

    With `auto`, in this order:

    1. a Softmax or LogSoftmax at the end, or a name with `logit`, `score`, `prob` or `label`: `kl`;
    2. a last axis as long as the vocabulary that the model looks up: `kl`;
    3. a name with `hidden`, `embed`, `feature` or `pool`: `embedding`;
    4. in a model that looks up no tokens, `(batch, classes)` from a Gemm or MatMul: `kl`;
    5. in a model that looks up tokens, three axes: `embedding`;
    6. `mse`.

    Caches of keys and values and outputs that are no floats are not matched.

    Raises:
        ModelError: no output can be matched.
    """
    tokens = find_token_input(model)
    vocabulary = None if tokens is None else tokens[1]
    found = [
        _target(value, loss, vocabulary)
        for value in model.graph.outputs
        if not _CACHE.match(value.name or "") and (value.dtype is None or _is_float(value))
    ]
    if not found:
        raise ModelError("distillation: the model has no float output besides caches")
    if (padding := find_padding(model)) is not None:
        found = [replace(target, padded=padding.reaches(target.value)) for target in found]
    return found


@dataclass(frozen=True)
class Steady:
    """What can be matched where lengths may follow from values.

    Attributes:
        targets: outputs that are as long in both models.
        moving: values of the main graph that may not be.
        notes: one for each output that is not matched.
    """

    targets: list[Target]
    moving: set[str]
    notes: list[str]


def steady_targets(model: ir.Model, loss: Loss, trained: Collection[str]) -> Steady:
    """Return the outputs to match that are as long in both models.

    Args:
        model: the model.
        loss: as for :func:`find_targets`.
        trained: stored tensors that differ between the models.

    Raises:
        ModelError: no output can be matched.
    """
    found = find_targets(model, loss)
    moving = moving_lengths(model, trained)
    steady = [target for target in found if target.value not in moving]
    if not steady:
        raise ModelError(
            f"distillation: output {found[0].output!r} cannot be matched: its length depends on "
            "the values that the pruned weights give, and may differ between the models"
        )
    notes = [
        f"output {target.output!r} is not matched: its length depends on the values"
        for target in found
        if target not in steady
    ]
    return Steady(steady, moving, notes)


def predicts_tokens(model: ir.Model) -> bool:
    """Whether the model gives logits of the tokens that it looks up, at each place of a text."""
    tokens = find_token_input(model)
    if tokens is None:
        return False
    shapes = [v.shape for v in model.graph.outputs if _kind(v, tokens[1]) == "kl"]
    return any(shape is not None and len(shape) == 3 for shape in shapes)


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _target(value: ir.Value, loss: Loss, vocabulary: int | None) -> Target:
    name, node = value.name or "", value.producer()
    if node is not None and node.op_type in _SOFTMAX and loss in ("auto", "kl"):
        before = node.inputs[0]
        assert before is not None, "a softmax has an input"
        return Target(name, before.name or "", "kl", node.attributes.get_int("axis", -1))
    return Target(name, name, _kind(value, vocabulary) if loss == "auto" else loss)


def _kind(value: ir.Value, vocabulary: int | None) -> Kind:
    name = value.name or ""
    shape = value.shape
    rank = None if shape is None else len(shape)
    if _LOGITS.search(name):
        return "kl"
    if vocabulary is not None and shape is not None and rank and shape[-1] == vocabulary:
        return "kl"
    if _VECTORS.search(name):
        return "embedding"
    if vocabulary is None and rank == 2 and _linear(value):
        return "kl"
    return "embedding" if vocabulary is not None and rank == 3 else "mse"


def _linear(value: ir.Value) -> bool:
    """Whether a Gemm, or a MatMul with or without a bias behind it, makes the value."""
    node = value.producer()
    if node is not None and node.op_type == "Add":
        makers = [v.producer() for v in node.inputs if v is not None]
        return any(maker is not None and maker.op_type == "MatMul" for maker in makers)
    return node is not None and node.op_type in ("Gemm", "MatMul")


@dataclass(frozen=True)
class Distance:
    """A loss and how many rows it is the mean of: tokens, images or texts."""

    loss: Tensor
    rows: int


def distance(
    targets: Sequence[Target],
    dense: Mapping[str, Tensor],
    sparse: Mapping[str, Tensor],
    mask: Tensor | None,
) -> Distance:
    """Return the mean over the targets of their losses; all weigh alike.

    Args:
        targets: at least one.
        dense, sparse: value name to what the two models give on one feed.
        mask: `(batch, length)`, zero where there is padding: the outputs that it is for leave it
            out. None where there is none.

    Raises:
        ModelError: the outputs do not fit each other.
    """
    losses, rows = [], 0
    for target in targets:
        a, b = dense[target.value], sparse[target.value]
        if a.shape != b.shape:
            raise ModelError(
                f"distillation: output {target.output!r} has shape {tuple(a.shape)} in the dense "
                f"model and {tuple(b.shape)} in the sparse one"
            )
        own = mask if target.padded else None
        valid = valid_rows(a, own)
        if target.kind == "kl":
            loss, count = _kl(a.movedim(target.axis, -1), b.movedim(target.axis, -1), valid)
        else:
            pairs = zip(
                compared(target.kind, a.float(), own),
                compared(target.kind, b.float(), own),
                strict=True,
            )
            loss = torch.stack([_relative(x, y) for x, y in pairs]).mean()
            count = int(valid.sum()) if valid is not None else a.shape[0] if a.ndim else 1
        losses.append(loss)
        rows = max(rows, count)
    return Distance(torch.stack(losses).mean(), rows)


def valid_rows(output: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return the mask as booleans where it applies to an output and marks anything."""
    if mask is None or output.ndim < 3 or output.shape[:2] != mask.shape:
        return None
    marked = mask != 0
    return None if bool(marked.all()) else marked


def _kl(a: Tensor, b: Tensor, valid: Tensor | None) -> tuple[Tensor, int]:
    """KL(dense ‖ sparse) in nats, mean over rows."""
    if valid is not None:
        a, b = a[valid], b[valid]
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    total: Tensor = _Divergence.apply(b, a)
    return total / len(a), len(a)


class _Divergence(torch.autograd.Function):
    """Σ KL over rows of logits, chunk by chunk; the gradient is made on the way forward.

    `∂/∂b KL(softmax a ‖ softmax b) = softmax b − softmax a`.
    """

    @staticmethod
    def forward(ctx: Any, sparse: Tensor, dense: Tensor) -> Tensor:
        rows = max(1, _CHUNK // max(1, sparse.shape[-1]))
        gradient = torch.empty_like(sparse) if ctx.needs_input_grad[0] else None
        total = sparse.new_zeros((), dtype=torch.float64)
        for start in range(0, len(sparse), rows):
            chosen = slice(start, start + rows)
            log_p = torch.log_softmax(dense[chosen].float(), -1)
            log_q = torch.log_softmax(sparse[chosen].float(), -1)
            p = log_p.exp()
            total += (log_p.sub_(log_q)).mul_(p).sum(dtype=torch.float64)
            if gradient is not None:
                gradient[chosen] = log_q.exp_().sub_(p)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None


def compared(kind: Kind, output: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Return what of an output is compared, all by `‖b − a‖² / ‖a‖²` and weighed alike.

    For `mse` that is the output where it is no padding. For `embedding` it is the hidden states,
    their means, and the means' pairwise cosines: similarities are what embeddings are used for
    (Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019, equation 3, with cosines
    and the diagonal left out).
    """
    valid = valid_rows(output, mask)
    whole = output if valid is None else output[valid]
    if kind != "embedding" or output.ndim not in (2, 3):
        return [whole]
    means = output
    if output.ndim == 3:
        weight = torch.ones(output.shape[:2]) if valid is None else valid.float()
        weight = (weight / weight.sum(1, keepdim=True).clamp(min=1)).unsqueeze(-1)
        means = (output * weight).sum(1)
    if len(output) == 1:
        return [whole, means]
    unit = torch.nn.functional.normalize(means, dim=-1)
    off = ~torch.eye(len(unit), dtype=torch.bool)
    return [whole, means, (unit @ unit.T)[off]]


def _relative(a: Tensor, b: Tensor) -> Tensor:
    return (b - a).square().sum() / a.square().sum().clamp(min=1e-12)
