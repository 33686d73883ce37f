"""The rows of a layer's regression, read from an activation: vectors, states, receptive fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod

import torch
from torch.nn.functional import pad

from iobs_onnx.errors import ModelError
from iobs_onnx.runtime.geometry import padding, span, transposed_padding
from iobs_onnx.site import Patches, PreviousStates, Routed, Rows, Stacked, Tap, TransposedPatches

# Patches repeat each input value once for each kernel position; they are made in chunks of this.
_CHUNK_BYTES = 64 << 20


def read_rows(
    activation: torch.Tensor,
    tap: Tap,
    keep: torch.Tensor | None,
    index: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Yield the rows `(groups, n, features)` of a tap, float32, in chunks of bounded size.

    An activation of a loop's body comes stacked, step by step, along one more axis in front; one
    without elements, of a body that did not run, has no rows.

    Args:
        activation: the tap's value, of any floating dtype.
        tap: how to read it.
        keep: boolean mask over the leading axes of `activation`, True where a position is
            not padding; None to keep all. Only for `Rows(-1)`.
        index: for `Routed`, the group of each place. Groups have as many rows as the fullest, and
            zeros where theirs end, which no sum of products sees.

    Raises:
        ModelError: the activation does not have the shape that the tap's weight multiplies.
    """
    form = tap.form
    if not activation.numel():
        return
    match form:
        case Patches():
            for step in _steps(activation, len(form.kernel) + 2):
                yield from _patches(step, tap, form)
        case TransposedPatches():
            for step in _steps(activation, len(form.kernel) + 2):
                yield from _transposed_patches(step, tap, form)
        case PreviousStates():
            for step in _steps(activation, 4):
                yield _previous_states(step, tap, form)
        case Stacked():
            yield _stacked(activation, tap, form)
        case Routed():
            assert index is not None, "it is fetched with the activation"
            yield from _routed(activation, tap, form, index)
        case Rows():
            yield _vectors(activation, tap, form, keep)


def _steps(activation: torch.Tensor, rank: int) -> Iterable[torch.Tensor]:
    """Yield the activations of rank `rank` that one more axis stacks; otherwise it alone."""
    return activation if activation.ndim == rank + 1 else [activation]


def _vectors(
    activation: torch.Tensor, tap: Tap, form: Rows, keep: torch.Tensor | None
) -> torch.Tensor:
    axis = form.axis
    if not -activation.ndim <= axis < activation.ndim or activation.shape[axis] != tap.features:
        raise _misfit(activation, tap, f"{tap.features} features along axis {axis}")
    axis = axis % activation.ndim - activation.ndim  # from the back: masking merges leading axes
    if keep is not None:
        activation = activation[keep]
    return activation.movedim(axis, -1).reshape(1, -1, tap.features).float()


def _stacked(activation: torch.Tensor, tap: Tap, form: Stacked) -> torch.Tensor:
    wanted = f"{tap.features} features along axes {form.features}"
    if form.batch:
        wanted += f" for each of {form.sizes} matrices along axes {form.batch}"
    # An axis that the activation lacks is one of length 1 in front.
    lacking = max(-activation.ndim - min(form.batch, default=0), 0)
    array = activation[(None,) * lacking] if lacking else activation
    axes = (*form.batch, *form.features)
    if not all(-array.ndim <= axis < array.ndim for axis in axes):
        raise _misfit(activation, tap, wanted)
    batch = [axis % array.ndim for axis in form.batch]
    features = [axis % array.ndim for axis in form.features]
    rows = [axis for axis in range(array.ndim) if axis not in {*batch, *features}]
    found = [array.shape[axis] for axis in batch]
    if prod(array.shape[axis] for axis in features) != tap.features or any(
        here not in (1, size) for here, size in zip(found, form.sizes, strict=True)
    ):
        raise _misfit(activation, tap, wanted)
    moved = array.permute(*batch, *rows, *features).float()
    moved = moved.reshape(*found, -1, tap.features)
    return moved.expand(*form.sizes, -1, -1).reshape(tap.groups, -1, tap.features)


def dealt(index: torch.Tensor, form: Routed) -> torch.Tensor:
    """Return the group of each place, `0 ... groups - 1`, one-dimensional."""
    flat = index.flatten().long()
    return torch.where(flat < 0, flat + form.matrices, flat)


def _routed(
    activation: torch.Tensor, tap: Tap, form: Routed, index: torch.Tensor
) -> Iterator[torch.Tensor]:
    wanted = f"{tap.features} features along axis {form.feature} at each of {index.numel()} places"
    rank = activation.ndim
    if not all(-rank <= axis for axis in (form.feature, form.along)) or (
        activation.shape[form.feature],
        activation.shape[form.along],
    ) != (tap.features, index.numel()):
        raise _misfit(activation, tap, wanted)
    places = activation.movedim((form.along, form.feature), (0, -1)).float()
    places = places.reshape(len(places), -1, tap.features)
    size = max(1, _CHUNK_BYTES // (4 * form.groups * places.shape[1] * tap.features))
    groups = dealt(index, form).to(activation.device)
    for rows, group in zip(places.split(size), groups.split(size), strict=True):
        counts = torch.bincount(group, minlength=form.groups)
        order = group.argsort(stable=True)
        # The place of a row among those of its group.
        rank_in = torch.arange(len(order), device=order.device)
        rank_in = rank_in - (counts.cumsum(0) - counts)[group[order]]
        table = rows.new_zeros((form.groups, int(counts.max()), *rows.shape[1:]))
        table[group[order], rank_in] = rows[order]
        yield table.reshape(form.groups, -1, tap.features)


def _previous_states(activation: torch.Tensor, tap: Tap, form: PreviousStates) -> torch.Tensor:
    directions = 2 if form.batch_first else 1
    if activation.ndim != 4 or (activation.shape[directions], activation.shape[3]) != (
        tap.groups,
        tap.features,
    ):
        raise _misfit(
            activation, tap, f"states of {tap.features} features in {tap.groups} directions"
        )
    states = activation.permute(1, 2, 0, 3) if form.batch_first else activation
    shifted = torch.zeros(states.shape, dtype=torch.float32, device=states.device)
    for direction, backwards in enumerate(form.reverse):
        if backwards:
            shifted[:-1, direction] = states[1:, direction]
        else:
            shifted[1:, direction] = states[:-1, direction]
    return shifted.movedim(1, 0).reshape(tap.groups, -1, tap.features)


def _patches(activation: torch.Tensor, tap: Tap, form: Patches) -> Iterator[torch.Tensor]:
    rank = len(form.kernel)
    channels = tap.features // prod(form.kernel)
    place = -1 if form.channels_last else 1
    if activation.ndim != rank + 2 or activation.shape[place] != form.groups * channels:
        raise _misfit(activation, tap, f"{form.groups * channels} channels and {rank} spatial axes")
    # Channels last, so that what is gathered for a kernel position is contiguous.
    image = activation.float().movedim(place, -1)
    image = _padded(image, padding(image.shape[1:-1], form))
    fields = _fields(image, activation, tap, form, form.strides)
    for chunk in _chunks(fields):
        yield chunk.reshape(form.groups, -1, tap.features)


def _transposed_patches(
    activation: torch.Tensor, tap: Tap, form: TransposedPatches
) -> Iterator[torch.Tensor]:
    """Read an ordinary convolution's patches: of the input with zeros put between its elements."""
    rank = len(form.kernel)
    channels = tap.features // prod(form.kernel)
    if activation.ndim != rank + 2 or activation.shape[1] != form.groups * channels:
        raise _misfit(activation, tap, f"{form.groups * channels} channels and {rank} spatial axes")
    batch, _, *space = activation.shape
    spread = [(size - 1) * stride + 1 for size, stride in zip(space, form.strides, strict=True)]
    image = activation.new_zeros((batch, *spread, activation.shape[1]), dtype=torch.float32)
    every = tuple(slice(None, None, stride) for stride in form.strides)
    image[(slice(None), *every)] = activation.movedim(1, -1).float()
    image = _padded(image, transposed_padding(space, form))
    fields = _fields(image, activation, tap, form, (1,) * rank)
    # Gathering reads the kernel backwards.
    fields = fields.flip([-2 - axis for axis in range(rank)])
    for chunk in _chunks(fields):
        yield chunk.reshape(form.groups, -1, tap.features)


def _fields(
    image: torch.Tensor,
    activation: torch.Tensor,
    tap: Tap,
    form: Patches | TransposedPatches,
    strides: tuple[int, ...],
) -> torch.Tensor:
    """Return `(groups, batch, *out, *kernel, channels)` of a padded image, channels last."""
    rank = len(form.kernel)
    for axis, dilation in enumerate(form.dilations):
        reach = span(form, axis)
        if image.shape[1 + axis] < reach:
            raise ModelError(
                f"activation {tap.value!r} has shape {tuple(activation.shape)}: smaller than the "
                f"kernel {form.kernel} of its convolution"
            )
        image = image.unfold(1 + axis, reach, strides[axis])[..., ::dilation]
    # (batch, *out, groups * channels, *kernel) -> (groups, batch, *out, *kernel, channels)
    fields = image.unflatten(1 + rank, (form.groups, -1)).movedim(1 + rank, 0)
    return fields.movedim(2 + rank, -1)


def _chunks(fields: torch.Tensor) -> Iterator[torch.Tensor]:
    """Split along the batch, and along the first spatial axis where one image is too large."""
    groups, _, first, *rest = fields.shape
    slice_bytes = max(1, 4 * groups * prod(rest))
    image_bytes = slice_bytes * first
    for images in fields.split(max(1, _CHUNK_BYTES // image_bytes), dim=1):
        yield from images.split(max(1, _CHUNK_BYTES // slice_bytes), dim=2)


def _padded(image: torch.Tensor, ends: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Pad the spatial axes of an image, channels last; torch's `pad` takes the last axis first."""
    flat = [count for pair in reversed(ends) for count in pair]
    return pad(image, (0, 0, *flat)).contiguous()


def _misfit(activation: torch.Tensor, tap: Tap, wanted: str) -> ModelError:
    shape = tuple(activation.shape)
    return ModelError(f"activation {tap.value!r} has shape {shape}: its weight multiplies {wanted}")


def shares_of(activation: torch.Tensor, tap: Tap, index: torch.Tensor) -> torch.Tensor:
    """Return how many rows each matrix meets, `(groups,)`."""
    assert isinstance(tap.form, Routed), "only their rows are dealt out"
    counts = torch.bincount(dealt(index, tap.form), minlength=tap.groups)
    return counts * (activation.numel() // max(1, index.numel() * tap.features))


def in_step(
    left: Iterator[torch.Tensor], rows: Iterator[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield both in chunks of equal length; they may be cut at different places.

    No more is held of the left ones than the next chunk of rows needs.
    """
    held: list[torch.Tensor] = []
    for chunk in rows:
        wanted = chunk.shape[1]
        while sum(part.shape[1] for part in held) < wanted:
            more = next(left, None)
            if more is None:
                return
            held.append(more)
        whole = held[0] if len(held) == 1 else torch.cat(held, dim=1)
        yield whole[:, :wanted], chunk
        held = [whole[:, wanted:]] if whole.shape[1] > wanted else []
