"""Sampling by grids, patches put together again, and spectra."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nn

from iobs_onnx.runtime.differentiable.context import Context
from iobs_onnx.runtime.differentiable.shape import sizes

_MODES = {"linear": "bilinear", "cubic": "bicubic"}


def grid_sample(context: Context, x: Tensor, grid: Tensor) -> Tensor:
    """GridSample, of images and of volumes."""
    mode = context.text("mode", "linear")
    return nn.grid_sample(
        x,
        grid,
        _MODES.get(mode, mode),
        context.text("padding_mode", "zeros"),
        bool(context.integer("align_corners", 0)),
    )


def affine_grid(context: Context, theta: Tensor, size: Tensor) -> Tensor:
    """AffineGrid."""
    return nn.affine_grid(theta, sizes(size), bool(context.integer("align_corners", 0)))


def column_to_image(context: Context, x: Tensor, image: Tensor, block: Tensor) -> Tensor:
    """Col2Im over one or two axes: overlapping patches are added."""
    shape, kernel = sizes(image), sizes(block)
    rank = len(shape)
    if rank > 2:
        raise context.error(f"{rank} spatial axes: torch folds one or two")
    pads = list(context.integers("pads") or (0,) * (2 * rank))
    strides = list(context.integers("strides") or (1,) * rank)
    dilations = list(context.integers("dilations") or (1,) * rank)
    begin, end = pads[:rank], pads[rank:]
    padded = [b + n + e for b, n, e in zip(begin, shape, end, strict=True)]
    if rank == 1:
        padded, kernel = [1, *padded], [1, *kernel]
        strides, dilations = [1, *strides], [1, *dilations]
    y = nn.fold(x, tuple(padded), tuple(kernel), tuple(dilations), 0, tuple(strides))
    y = y.squeeze(2) if rank == 1 else y
    for axis in range(rank):
        y = y.narrow(2 + axis, begin[axis], shape[axis])
    return y


def _complex(x: Tensor) -> Tensor:
    """Return a signal with a last axis of one or two parts as complex numbers."""
    if x.shape[-1] == 2:
        return torch.view_as_complex(x.contiguous())
    return torch.complex(x[..., 0], torch.zeros_like(x[..., 0]))


def fourier(
    context: Context, x: Tensor, length: Tensor | None = None, axis: Tensor | None = None
) -> Tensor:
    """DFT, with its inverse and the half that a real signal needs."""
    along = context.integer("axis", 1) if context.version < 20 else -2
    along = (along if axis is None else int(axis)) % x.ndim
    count = None if length is None else int(length)
    onesided = bool(context.integer("onesided", 0))
    if context.integer("inverse", 0):
        if onesided:
            return torch.fft.irfft(_complex(x), count, along).unsqueeze(-1)
        return torch.view_as_real(torch.fft.ifft(_complex(x), count, along))
    if onesided:
        return torch.view_as_real(torch.fft.rfft(x[..., 0], count, along))
    return torch.view_as_real(torch.fft.fft(_complex(x), count, along))


def short_time_fourier(
    context: Context,
    x: Tensor,
    step: Tensor,
    window: Tensor | None = None,
    length: Tensor | None = None,
) -> Tensor:
    """STFT `(batch, frames, bins, 2)`."""
    if length is not None:
        count = int(length)
    else:
        assert window is not None
        count = window.shape[0]
    frames = x.movedim(-1, 1).unfold(2, count, int(step)).movedim(1, -1)
    if window is not None:
        frames = frames * window[:, None]
    if context.integer("onesided", 1) and x.shape[-1] == 1:
        return torch.view_as_real(torch.fft.rfft(frames[..., 0], dim=2))
    return torch.view_as_real(torch.fft.fft(_complex(frames), dim=2))
