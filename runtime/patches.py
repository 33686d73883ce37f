"""The rows of a layer's regression, read from an activation: vectors or receptive fields."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch.nn.functional import pad

from iobs_onnx.errors import ModelError
from iobs_onnx.site import Patches, Tap

# Patches repeat each input value once for each kernel position; they are made in chunks of this.
_CHUNK_BYTES = 64 << 20


def read_rows(
    activation: torch.Tensor, tap: Tap, keep: torch.Tensor | None
) -> Iterator[torch.Tensor]:
    """Yield the rows `(groups, n, features)` of a tap, float32, in chunks of bounded size.

    Args:
        activation: the tap's value, of any floating dtype.
        tap: how to read it.
        keep: boolean mask over the leading axes of `activation`, True where a position is no
            padding; None to keep all. Only for `Rows(-1)`.

    Raises:
        ModelError: the activation has not the shape that the tap's weight multiplies.
    """
    form = tap.form
    if isinstance(form, Patches):
        return _patches(activation, tap, form)
    axis = form.axis
    if not -activation.ndim <= axis < activation.ndim or activation.shape[axis] != tap.features:
        raise ModelError(
            f"activation {tap.value!r} has shape {tuple(activation.shape)}: its weight multiplies "
            f"{tap.features} features along axis {axis}"
        )
    axis = axis % activation.ndim - activation.ndim  # from the back: masking merges leading axes
    if keep is not None:
        activation = activation[keep]
    return iter([activation.movedim(axis, -1).reshape(1, -1, tap.features).float()])


def _patches(activation: torch.Tensor, tap: Tap, form: Patches) -> Iterator[torch.Tensor]:
    rank = len(form.kernel)
    channels = tap.features // prod(form.kernel)
    if activation.ndim != rank + 2 or activation.shape[1] != form.groups * channels:
        raise ModelError(
            f"activation {tap.value!r} has shape {tuple(activation.shape)}: its convolution takes "
            f"{form.groups * channels} channels and {rank} spatial axes"
        )
    # Channels last, so that what is gathered for a kernel position is contiguous.
    image = activation.float().movedim(1, -1)
    image = pad(image, (0, 0, *_padding(activation.shape[2:], form))).contiguous()
    for axis in range(rank):
        span = (form.kernel[axis] - 1) * form.dilations[axis] + 1
        if image.shape[1 + axis] < span:
            raise ModelError(
                f"activation {tap.value!r} has shape {tuple(activation.shape)}: smaller than the "
                f"kernel {form.kernel} of its convolution"
            )
        image = image.unfold(1 + axis, span, form.strides[axis])[..., :: form.dilations[axis]]
    # (batch, *out, groups * channels, *kernel) -> (groups, batch, *out, *kernel, channels)
    fields = image.unflatten(1 + rank, (form.groups, channels)).movedim(1 + rank, 0)
    fields = fields.movedim(2 + rank, -1)
    for chunk in _chunks(fields):
        yield chunk.reshape(form.groups, -1, tap.features)


def _chunks(fields: torch.Tensor) -> Iterator[torch.Tensor]:
    """Split along the batch, and along the first spatial axis where one image is too large."""
    groups, _, first, *rest = fields.shape
    slice_bytes = max(1, 4 * groups * prod(rest))
    image_bytes = slice_bytes * first
    for images in fields.split(max(1, _CHUNK_BYTES // image_bytes), dim=1):
        yield from images.split(max(1, _CHUNK_BYTES // slice_bytes), dim=2)


def _padding(space: tuple[int, ...], form: Patches) -> list[int]:
    """Return begin and end of each spatial axis, last axis first, as torch's `pad` takes them."""
    rank = len(space)
    result: list[int] = []
    for axis in reversed(range(rank)):
        if form.auto_pad == "NOTSET":
            begin, end = form.pads[axis], form.pads[rank + axis]
        elif form.auto_pad == "VALID":
            begin = end = 0
        else:  # SAME_*: as many outputs as strides fit into the input
            stride = form.strides[axis]
            span = (form.kernel[axis] - 1) * form.dilations[axis] + 1
            outputs = -(-space[axis] // stride)
            total = max(0, (outputs - 1) * stride + span - space[axis])
            begin = total // 2 if form.auto_pad == "SAME_UPPER" else total - total // 2
            end = total - begin
        result += [begin, end]
    return result
