"""Sums of products over batches, added up where they are formed or sent and added elsewhere."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Self

import torch

from iobs_onnx.errors import DataError
from iobs_onnx.hessian import Cross, Hessian

# Rows a product takes at once, and products added in float32 before their sum goes to float64.
# An addition to a sum that has grown large rounds by up to 6e-8 of it, all in one direction when
# the data have an offset: 64 additions lose up to 1e-6, 512 up to 7.6e-6, 5000 some 7e-5. A BLAS
# may add the rows of a product one by one, and does where columns are few, so both counts bound a
# chain of additions; a product is never begun from the sum, which would join the two chains.
_ROWS = 512
_FLUSH = 64


@dataclass
class _Strip:
    """Rows `start:start+width` of a sum of products, from column `first` on.

    Products are added in float32, a few at a time, and these sums in float64: first those of a
    shard, then those of all shards, in their order. So a shard counts the same bits whether it is
    summed here or elsewhere and merged.
    """

    start: int
    first: int
    size: tuple[int, int, int]  # (groups, width, in - first)
    device: torch.device
    panel: torch.Tensor | None = None  # float32, the latest products of the shard that is read
    pending: int = 0  # products in `panel`
    shard: torch.Tensor | None = None  # float64, those before
    total: torch.Tensor | None = None  # of the shards before, float64 but for a first one
    own: bool = True  # whether `total` may be added to in place; what was sent may lie elsewhere

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add `leftᵀ right`; both `(groups, n, in)`."""
        width, product = self.size[1], None
        for a, b in zip(left.split(_ROWS, dim=1), right.split(_ROWS, dim=1), strict=True):
            columns, rows = a[..., self.start : self.start + width].mT, b[..., self.first :]
            if self.pending == _FLUSH:
                self._flush()
            if self.panel is None:
                self.panel = torch.empty(self.size, device=self.device)
            if self.pending:
                product = torch.empty_like(self.panel) if product is None else product
                self.panel += torch.bmm(columns, rows, out=product)
            else:
                torch.bmm(columns, rows, out=self.panel)
            self.pending += 1

    def _flush(self) -> None:
        """Move the latest products to the shard's sum."""
        if self.panel is not None and self.pending:
            self.shard = self.panel.double() if self.shard is None else self.shard.add_(self.panel)
        self.pending = 0

    def seal(self) -> None:
        """End the shard: add its sum to those before."""
        if self.shard is not None:
            self._flush()
        here = self.panel if self.shard is None and self.pending else self.shard
        self._plus(here)
        if self.total is self.panel:  # the first shard, which float32 still holds exactly
            self.panel = None
        self.shard, self.pending = None, 0

    def merge(self, other: _Strip) -> None:
        """Add the sums of other shards; both are sealed."""
        if other.total is not None:
            self._plus(other.total.to(self.device), own=other.own)

    def _plus(self, more: torch.Tensor | None, *, own: bool = True) -> None:
        """Add the sum of a shard in float64; None is zero."""
        if more is None:
            return
        if self.total is None:
            self.total, self.own = more, own
        else:
            self.total, self.own = self.total.to(torch.float64, copy=not self.own).add_(more), True

    def move(self, device: torch.device) -> None:
        """Move what is sealed, and let go of all else."""
        self.device, self.panel = device, None
        self.total = None if self.total is None else self.total.to(device)

    def __getstate__(self) -> dict[str, Any]:
        """Send what is sealed as an array: as a tensor it is copied five times on its way."""
        assert (self.shard, self.pending) == (None, 0), "only what is sealed is sent"
        total = None if self.total is None else self.total.numpy(force=True)
        return {**self.__dict__, "panel": None, "total": total}

    def __setstate__(self, state: dict[str, Any]) -> None:
        total = state["total"]
        if total is not None:
            with warnings.catch_warnings():  # torch warns of memory that cannot be written to
                warnings.simplefilter("ignore", UserWarning)
                total = torch.from_numpy(total)
        self.__dict__.update(state, total=total, own=False)

    def mean(self, weight: float) -> torch.Tensor:
        total = torch.zeros(self.size, device=self.device) if self.total is None else self.total
        return total.double().div_(weight).float()

    def finite(self) -> list[torch.Tensor]:
        """Look at the sums of squares only: a row that is not finite spoils its own."""
        held = self.panel if self.pending else None, self.shard, self.total
        return [s.diagonal(dim1=1, dim2=2).isfinite().all() for s in held if s is not None]


def _strip_width(features: int, device: torch.device) -> int:
    """Return how wide the strips of an upper half are.

    No general product knows that XᵀX is symmetric, so the half that is wanted is cut into strips
    `H[s:s+width, s:]`. Narrow strips compute little of the lower half, wide ones read X less often:
    of 64..384, 128 was the fastest on a CPU up to 768 features, 192 at 1536 and 3072.
    """
    if device.type == "cuda":
        return 1024
    return 128 if features <= 1024 else 192


class _Sums:
    """Rows `(groups, n, features)` in float32 on one device, their number, weight and sum."""

    def __init__(self, features: int, groups: int, device: torch.device | str) -> None:
        self.features = features
        self.groups = groups
        self.rows = 0
        self._device = torch.device(device)
        # Of the shard that is read, and of those before.
        self._here, self._weight_here = self._zeros(), 0.0
        self._sum, self._weight = self._zeros(), 0.0
        self._shares: torch.Tensor | None = None
        self._strips: list[_Strip] = []

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(self.groups, self.features, dtype=torch.float64, device=self._device)

    def seal(self) -> None:
        """End a shard: what is added from now on is another's."""
        self._sum, self._here = self._sum + self._here, self._zeros()
        self._weight, self._weight_here = self._weight + self._weight_here, 0.0
        for strip in self._strips:
            strip.seal()

    def merge(self, other: Self) -> None:
        """Add the sums of another shard: the result is that of adding its rows here, bit by bit.

        Sums are exact in their weights: rows that weigh differently may lie in either part.
        """
        self.seal()
        other.seal()
        self.rows += other.rows
        self._weight += other._weight
        self._sum += other._sum.to(self._device)
        if other._shares is not None:
            self._shares = other._shares + (0 if self._shares is None else self._shares)
        for strip, more in zip(self._strips, other._strips, strict=True):
            strip.merge(more)

    def move(self, device: torch.device) -> None:
        """Move sealed sums to a device."""
        self._device = device
        self._here, self._sum = self._here.to(device), self._sum.to(device)
        for strip in self._strips:
            strip.move(device)

    @property
    def parts(self) -> int:
        """How many ways the work of `add` can be split."""
        return len(self._strips)

    def _shaped(self, rows: torch.Tensor, features: int) -> torch.Tensor:
        return rows.to(self._device, torch.float32).reshape(self.groups, -1, features)

    def _count(self, rows: torch.Tensor, weight: float, shares: torch.Tensor | None) -> None:
        count = rows.shape[1] if shares is None else int(shares.sum())
        self.rows += count
        self._weight_here += weight * count
        if shares is not None:
            self._shares = shares.double().cpu() + (0 if self._shares is None else self._shares)
        self._here.add_(rows.sum(1, dtype=torch.float64), alpha=weight)

    def _require_rows(self) -> None:
        if self.rows == 0:
            raise DataError(
                "no rows reached the Hessian: every position was padding; check the feeds"
            )


class GramAccumulator(_Sums):
    """Sums `XᵀX` over batches, on the device it is given.

    Relative Frobenius error against float64 is below 1e-5 for any number of batches, in whatever
    order the BLAS adds. Run it under :func:`exact_float32` where the process may have chosen
    faster products.

    Args:
        features: the order `in` of the matrix.
        groups: independent matrices, one for each leading slice of the rows.
        device: `cpu` or a CUDA device.
    """

    def __init__(self, features: int, groups: int = 1, device: torch.device | str = "cpu") -> None:
        super().__init__(features, groups, device)
        width = _strip_width(features, self._device)
        for start in range(0, features, width):
            size = (groups, min(width, features - start), features - start)
            self._strips.append(_Strip(start, start, size, self._device))

    def add(
        self,
        rows: torch.Tensor,
        weight: float = 1.0,
        *,
        shares: torch.Tensor | None = None,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        """Add rows, `(groups, n, in)` or, with one group, `(n, in)`, each counting `weight` times.

        `shares`, `(groups,)` integers, says how many of them are rows where the others are zeros
        that only fill a group up; None where all are.

        With `parts` > 1 only share `part` of the matrix is updated: threads may add the same rows
        at the same time, each its own part. All parts must see all rows.
        """
        rows = self._shaped(rows, self.features)
        if part == 0:
            self._count(rows, weight, shares)
        scaled = rows if weight == 1.0 else rows * weight**0.5
        for strip in self._strips[part::parts]:
            strip.add(scaled, scaled)

    def finite(self, part: int = 0, parts: int = 1) -> torch.Tensor:
        """Whether the sums of squares hold no NaN, Inf or overflow, as a boolean on the device."""
        found = [flag for strip in self._strips[part::parts] for flag in strip.finite()]
        return torch.stack(found).all() if found else torch.tensor(True, device=self._device)

    def finish(self) -> Hessian:
        """Return the Hessian and release the sums.

        Raises:
            DataError: no row was added.
        """
        self._require_rows()
        self.seal()
        matrix = torch.empty(self.groups, self.features, self.features, device=self._device)
        while self._strips:
            strip = self._strips.pop()
            mean = strip.mean(self._weight)
            start, stop = strip.start, strip.start + mean.shape[1]
            square = mean[..., : stop - start]
            matrix[:, start:stop, start:stop] = square.triu() + square.triu(1).mT
            matrix[:, start:stop, stop:] = mean[..., stop - start :]
            matrix[:, stop:, start:stop] = mean[..., stop - start :].mT
        mean = (self._sum / self._weight).float()
        return Hessian(matrix, self.rows, self._weight, mean, shares=self._shares)


class CrossAccumulator(_Sums):
    """Sums `LᵀX` over batches; arguments and accuracy as for :class:`GramAccumulator`.

    Args:
        left: columns of `L`.
        features: columns of `X`.
        groups, device: as there.
    """

    def __init__(
        self, left: int, features: int, groups: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(left, groups, device)
        self._right = features
        width = _strip_width(features, self._device)
        for start in range(0, left, width):
            size = (groups, min(width, left - start), features)
            self._strips.append(_Strip(start, 0, size, self._device))

    def add(
        self,
        left: torch.Tensor,
        rows: torch.Tensor,
        weight: float = 1.0,
        *,
        shares: torch.Tensor | None = None,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        """Add as many rows of `L` as of `X`; see :meth:`GramAccumulator.add`."""
        left = self._shaped(left, self.features)
        if part == 0:
            self._count(left, weight, shares)
        scaled = left if weight == 1.0 else left * weight
        for strip in self._strips[part::parts]:
            strip.add(scaled, self._shaped(rows, self._right))

    def finish(self) -> Cross:
        """Return the mean product and release the sums; DataError where no row was added."""
        self._require_rows()
        self.seal()
        panels = [strip.mean(self._weight) for strip in self._strips]
        self._strips.clear()
        return Cross(torch.cat(panels, dim=1), (self._sum / self._weight).float())
