"""The records that `passes` and `runtime` share: what is pruned, and what is measured for it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.site.grid import Packed, Quantized


@dataclass(frozen=True)
class Rows:
    """Rows of the regression are the activation's vectors along `axis`.

    `axis` is negative or counts from the front, as in NumPy; all other axes are rows.
    MatMul with the weight on the right reads axis -1, with the weight on the left axis -2.
    """

    axis: int = -1

    groups = 1

    def __str__(self) -> str:
        return "" if self.axis == -1 else f"axis {self.axis}"


@dataclass(frozen=True)
class Stacked:
    """Rows of several regressions, one for each index of the `batch` axes: heads, experts.

    A row is flattened from the axes `features`, in that order; all axes that are neither are
    rows. Axes are negative or count from the front. `sizes` are the lengths of the batch axes in
    the weight; an activation that lacks one, or has length 1 there, meets every matrix.
    """

    features: tuple[int, ...]
    batch: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()

    @property
    def groups(self) -> int:
        """Number of regressions."""
        return prod(self.sizes)

    def __str__(self) -> str:
        batch = f", one matrix for each of axes {self.batch}" if self.batch else ""
        return f"axes {self.features}{batch}"


@dataclass(frozen=True)
class Patches:
    """Rows of the regression are the receptive fields of a convolution (im2col).

    The activation is `(batch, groups * channels, *space)`, or with `channels_last`
    `(batch, *space, groups * channels)`. A patch is flattened with the kernel positions first and
    the input channels last, `(*kernel, channels)`, so that consecutive columns are consecutive
    *input channels*: the order 2:4 hardware groups.

    `pads` holds the begin of every spatial axis, then the end of every one, as in ONNX.
    `auto_pad` is `NOTSET` (use `pads`), `VALID`, `SAME_UPPER` or `SAME_LOWER`; the last two
    depend on the activation's size and are resolved when it is seen.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = "NOTSET"
    groups: int = 1
    channels_last: bool = False

    def __str__(self) -> str:
        return f"patches {_times(self.kernel)}, stride {_times(self.strides)}"


@dataclass(frozen=True)
class TransposedPatches:
    """Rows of the regression are what a transposed convolution gathers for an output position.

    Kernel position `k` brings input `i` to output `i * stride + k * dilation - pad`. A row holds,
    for every kernel position, the input that it brings to the row's output position, or zeros
    where there is none; columns are ordered as those of :class:`Patches`.

    `output_shape` (empty if not given) and `auto_pad` override `pads`, as in ONNX.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    output_padding: tuple[int, ...]
    output_shape: tuple[int, ...] = ()
    auto_pad: str = "NOTSET"
    groups: int = 1

    def __str__(self) -> str:
        return f"transposed patches {_times(self.kernel)}, stride {_times(self.strides)}"


@dataclass(frozen=True)
class PreviousStates:
    """Rows are the hidden states that the steps of a recurrent node read: those one step before.

    The activation is the node's output `(time, directions, batch, hidden)`, or with `batch_first`
    `(batch, time, directions, hidden)`. Each direction has a regression of its own; `reverse` says
    which of them run backwards in time. The row of a sequence's first step is zero: a state that
    the node is given to start from is another tap of the same site.
    """

    reverse: tuple[bool, ...]
    batch_first: bool = False

    @property
    def groups(self) -> int:
        """Number of directions."""
        return len(self.reverse)

    def __str__(self) -> str:
        return "one step before"


@dataclass(frozen=True)
class Routed:
    """Rows of several regressions, dealt out by an index: tokens to experts.

    `index` names a value that holds one integer for each place along the axis `along`: the matrix
    that meets this place. A row is the vector along `feature` there; axes are negative. A place
    may be negative, as in ONNX, and then counts from the last matrix.
    """

    feature: int
    along: int
    matrices: int
    index: str

    @property
    def groups(self) -> int:
        """Number of regressions."""
        return self.matrices

    def __str__(self) -> str:
        return f"axis {self.feature}, dealt out to {self.matrices} matrices by {self.index}"


RowForm: TypeAlias = Rows | Stacked | Patches | TransposedPatches | PreviousStates | Routed


@dataclass(frozen=True)
class Tap:
    """An activation whose Gram matrix is collected, and how its rows are read.

    Two sites that read the same value in the same form share one tap, hence one Hessian and
    one factorisation. `features` is the order of the Hessian (per group).
    """

    value: str
    form: RowForm
    features: int

    @property
    def groups(self) -> int:
        """Number of independent Hessians this tap yields."""
        return self.form.groups

    @property
    def values(self) -> tuple[str, ...]:
        """All that has to be fetched: the activation, and what deals its rows out."""
        return (self.value, self.form.index) if isinstance(self.form, Routed) else (self.value,)

    @property
    def label(self) -> str:
        """The activation, and how it is read unless that is by vectors along the last axis."""
        form = str(self.form)
        return f"{self.value} ({form})" if form else self.value


@dataclass(frozen=True)
class Site:
    """One prunable weight.

    The stored tensor becomes the matrices `W`, `(groups, out, in)`, by
    `stored.reshape(view).transpose(perm).reshape(groups, out, in)`, dequantised first where it is
    an integer; :meth:`to_matrices` and :meth:`to_stored` are the only places that know.

    Attributes:
        name: readable and unique; what `--include` and `--exclude` match.
        nodes: names of the nodes that multiply by this weight (several if it is shared).
        op_type: their operator.
        initializer: name of the stored tensor: an initializer, or a Constant node's output.
        shape: shape of the stored tensor.
        dtype: ONNX type name of the stored tensor, e.g. ``FLOAT16``.
        axis: the axis of the stored tensor along which a deployment engine groups 2:4.
        perm: axes of the stored tensor's view in the order group, output, reduction.
        groups, out_features, in_features: sizes of `W`; `out` and `in` are per group.
        taps: the activations that meet this weight; their Hessians are summed.
        view: the shape in which `perm` reads the stored tensor; None for its own.
        quantized: what the integers of the stored tensor stand for; None for floats. With a
            :class:`Packed` grid the view is of `(out, in)`.
    """

    name: str
    nodes: tuple[str, ...]
    op_type: str
    initializer: str
    shape: tuple[int, ...]
    dtype: str
    axis: int
    perm: tuple[int, ...]
    groups: int
    out_features: int
    in_features: int
    taps: tuple[Tap, ...]
    view: tuple[int, ...] | None = None
    quantized: Quantized | Packed | None = None

    @property
    def run(self) -> int:
        """Consecutive columns of `W` that hardware groups: the last axis of reduction.

        Patterns N:M must divide it, so that no group of M straddles two kernel positions.
        """
        return self._view[self.perm[-1]] if self.in_features > 1 else 1

    @property
    def _view(self) -> tuple[int, ...]:
        return self.shape if self.view is None else self.view

    def to_matrices(self, stored: NDArray[np.generic]) -> NDArray[np.float32]:
        """Return the stored tensor as `W`, float32, `(groups, out, in)`; always a copy."""
        real = stored if self.quantized is None else self.quantized.dequantize(stored)
        moved = real.reshape(self._view).transpose(self.perm)
        matrices = moved.astype(np.float32, order="C", copy=True)
        return matrices.reshape(self.groups, self.out_features, self.in_features)

    def to_stored(
        self, matrices: NDArray[np.float32], dtype: np.dtype[np.generic]
    ) -> NDArray[np.generic]:
        """Return `W`, `(groups, out, in)`, in the stored shape and `dtype`; zeros stay zeros."""
        moved = matrices.reshape([self._view[axis] for axis in self.perm])
        moved = moved.transpose(np.argsort(self.perm))
        if isinstance(self.quantized, Packed):
            return self.quantized.quantize(moved, dtype)
        real = moved.reshape(self.shape)
        if self.quantized is None:
            return np.ascontiguousarray(real.astype(dtype))
        return np.ascontiguousarray(self.quantized.quantize(real, dtype))


@dataclass(frozen=True)
class Declined:
    """A candidate weight that is not pruned, and why; it stands in the report."""

    name: str
    nodes: tuple[str, ...]
    op_type: str
    initializer: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Other:
    """A stored tensor that is no candidate, and why; `matrix` says whether it could be a weight."""

    initializer: str
    shape: tuple[int, ...]
    reason: str
    matrix: bool


@dataclass(frozen=True)
class Candidates:
    """What :func:`iobs_onnx.passes.sites.find_sites` found, in graph order."""

    sites: tuple[Site, ...]
    declined: tuple[Declined, ...]


def _times(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))
