"""The records that `passes` and `runtime` share: what is pruned, and what is measured for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Rows:
    """Rows of the regression are the activation's vectors along `axis`.

    `axis` is negative or counts from the front, as in NumPy; all other axes are rows.
    MatMul with the weight on the right reads axis -1, with the weight on the left axis -2.
    """

    axis: int = -1


@dataclass(frozen=True)
class Patches:
    """Rows of the regression are the receptive fields of a convolution (im2col).

    The activation is `(batch, groups * channels, *space)`. A patch is flattened with the
    kernel positions first and the input channels last, `(*kernel, channels)`, so that
    consecutive columns are consecutive *input channels*: the order 2:4 hardware groups.

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


RowForm: TypeAlias = Rows | Patches


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
        return self.form.groups if isinstance(self.form, Patches) else 1


@dataclass(frozen=True)
class Site:
    """One prunable weight.

    The stored tensor becomes the matrices `W`, `(groups, out, in)`, by
    `stored.transpose(perm).reshape(groups, out, in)`; :meth:`to_matrices` and
    :meth:`to_stored` are the only places that know.

    Attributes:
        name: readable and unique; what `--include` and `--exclude` match.
        nodes: names of the nodes that multiply by this weight (several if it is shared).
        op_type: their operator.
        initializer: name of the stored tensor: an initializer, or a Constant node's output.
        shape: shape of the stored tensor.
        dtype: ONNX type name of the stored tensor, e.g. ``FLOAT16``.
        axis: the axis of the stored tensor along which a deployment engine groups 2:4.
        perm: axes of the stored tensor in the order output first, reduction last.
        groups, out_features, in_features: sizes of `W`; `out` and `in` are per group.
        taps: the activations that meet this weight; their Hessians are summed.
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

    @property
    def run(self) -> int:
        """Length of the stored `axis`: consecutive columns of `W` that hardware groups.

        Patterns N:M must divide it, so that no group of M straddles two kernel positions.
        """
        return self.shape[self.axis]

    def to_matrices(self, stored: NDArray[np.generic]) -> NDArray[np.float32]:
        """Return the stored tensor as `W`, float32, `(groups, out, in)`; always a copy."""
        moved = stored.transpose(self.perm).astype(np.float32, order="C", copy=True)
        return moved.reshape(self.groups, self.out_features, self.in_features)

    def to_stored(
        self, matrices: NDArray[np.float32], dtype: np.dtype[np.generic]
    ) -> NDArray[np.generic]:
        """Return `W`, `(groups, out, in)`, in the stored shape and `dtype`."""
        moved = matrices.reshape([self.shape[axis] for axis in self.perm])
        return np.ascontiguousarray(moved.transpose(np.argsort(self.perm)).astype(dtype))


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
class Candidates:
    """What :func:`iobs_onnx.passes.find_sites` found, in graph order."""

    sites: tuple[Site, ...]
    declined: tuple[Declined, ...]
