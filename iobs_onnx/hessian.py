"""The Hessian of a layer's squared error: `H = XᵀX / n`, accumulated batch by batch.

`X`, `(n, in)`, holds one row for each token, pixel or patch the layer multiplies. All functions
take and return torch tensors and never change their arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from iobs_onnx.errors import DataError

# Rows a product takes at once: a slice of X that stays in a CPU's cache.
_ROWS = {"cpu": 512, "cuda": 65536}
# float32 sums are moved to float64 after this many products. Each addition to a sum that has
# grown large rounds by up to 6e-8 of it, all in one direction when the data have an offset:
# 5000 additions lose 7e-6, 20000 lose 4e-5.
_FLUSH = 64


@dataclass(frozen=True)
class Hessian:
    """`XᵀX / rows` of one activation.

    Attributes:
        matrix: float32, `(groups, in, in)`, symmetric, both halves filled.
        rows: the number of rows of `X` that went in, per group.
    """

    matrix: torch.Tensor
    rows: int


def combine(hessians: Sequence[Hessian]) -> Hessian:
    """Return the Hessian of all rows together, for a weight that several activations meet."""
    if len(hessians) == 1:
        return hessians[0]
    rows = sum(hessian.rows for hessian in hessians)
    matrix = torch.zeros_like(hessians[0].matrix)
    for hessian in hessians:
        matrix.add_(hessian.matrix, alpha=hessian.rows / rows)
    return Hessian(matrix, rows)


def dead_inputs(matrix: torch.Tensor) -> torch.Tensor:
    """Return the mask `(..., in)` of inputs that were zero in every row: `diag(H) == 0`."""
    return matrix.diagonal(dim1=-2, dim2=-1) == 0


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep float32 products at float32 (no TF32, no bfloat16), whatever the caller has chosen."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen)


@dataclass
class _Strip:
    """Rows `start:start+width` of the upper half of the Gram matrix."""

    start: int
    panel: torch.Tensor  # float32 (groups, width, in - start): the latest products
    pending: int = 0  # products in `panel`
    total: torch.Tensor | None = None  # float64, the flushed ones

    def add(self, rows: torch.Tensor) -> None:
        width = self.panel.shape[1]
        for chunk in rows.split(_ROWS[rows.device.type], dim=1):
            if self.pending == _FLUSH:
                self.flush()
            left = chunk[..., self.start : self.start + width].mT
            self.panel.baddbmm_(left, chunk[..., self.start :])
            self.pending += 1

    def flush(self) -> None:
        if self.total is None:
            self.total = self.panel.double()
        else:
            self.total += self.panel
        self.panel.zero_()
        self.pending = 0

    def mean(self, rows: int) -> torch.Tensor:
        sums = self.panel if self.total is None else self.total + self.panel
        return sums.div(rows).float()

    def finite(self) -> bool:
        """Look at the sums of squares only: a row that is not finite spoils its own."""
        sums = [self.panel] if self.total is None else [self.panel, self.total]
        return all(bool(s.diagonal(dim1=1, dim2=2).isfinite().all()) for s in sums)


def _strip_width(features: int, device: torch.device) -> int:
    """Return how wide the strips of an upper half are.

    No general product knows that XᵀX is symmetric, so the half that is wanted is cut into strips
    `H[s:s+width, s:]`. Narrow strips compute little of the lower half, wide ones read X less often:
    of 64..384, 128 was the fastest on a CPU up to 768 features, 192 at 1536 and 3072.
    """
    if device.type == "cuda":
        return 1024
    return 128 if features <= 1024 else 192


class GramAccumulator:
    """Sums `XᵀX` over batches, on the device it is given.

    Relative Frobenius error against float64 is below 1e-5 for any number of batches. Run it
    under :func:`exact_float32` where the process may have chosen faster products.

    Args:
        features: the order `in` of the matrix.
        groups: independent matrices, one for each leading slice of the rows.
        device: `cpu` or a CUDA device.
    """

    def __init__(self, features: int, groups: int = 1, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        width = _strip_width(features, device)
        self.features = features
        self.groups = groups
        self.rows = 0
        self._device = device
        self._strips = [
            _Strip(
                start,
                torch.zeros(groups, min(width, features - start), features - start).to(device),
            )
            for start in range(0, features, width)
        ]

    @property
    def parts(self) -> int:
        """How many ways the work of :meth:`add` can be split."""
        return len(self._strips)

    def add(self, rows: torch.Tensor, part: int = 0, parts: int = 1) -> None:
        """Add rows, `(groups, n, in)` or, with one group, `(n, in)`, of any floating dtype.

        With `parts` > 1 only share `part` of the matrix is updated: threads may add the same rows
        at the same time, each its own part. All parts must see all rows.
        """
        rows = rows.to(self._device, torch.float32).reshape(self.groups, -1, self.features)
        for strip in self._strips[part::parts]:
            strip.add(rows)
        if part == 0:
            self.rows += rows.shape[1]

    def finite(self, part: int = 0, parts: int = 1) -> bool:
        """Whether the sums of squares are finite: false after a NaN, an Inf or an overflow."""
        return all(strip.finite() for strip in self._strips[part::parts])

    def finish(self) -> Hessian:
        """Return the Hessian and release the sums.

        Raises:
            DataError: no row was added.
        """
        if self.rows == 0:
            raise DataError(
                "no rows reached the Hessian: every position was padding; check the feeds"
            )
        matrix = torch.empty(self.groups, self.features, self.features, device=self._device)
        while self._strips:
            strip = self._strips.pop()
            mean = strip.mean(self.rows)
            start, stop = strip.start, strip.start + mean.shape[1]
            square = mean[..., : stop - start]
            matrix[:, start:stop, start:stop] = square.triu() + square.triu(1).mT
            matrix[:, start:stop, stop:] = mean[..., stop - start :]
            matrix[:, stop:, start:stop] = mean[..., stop - start :].mT
        return Hessian(matrix, self.rows)
