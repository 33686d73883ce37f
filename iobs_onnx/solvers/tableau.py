"""Sweep tableaux: the exact least-squares state of many rows, changed one weight at a time.

For one row with quadratic `½ (x − w)ᵀ H (x − w)`, kept set A and removed set B, the tableau is

    T = [ −H_AA⁻¹         H_AA⁻¹ H_AB               ]      y = [ x_A                    ]
        [ H_BA H_AA⁻¹     H_BB − H_BA H_AA⁻¹ H_AB   ]          [ −(gradient at x)_B     ]

where `x_A` is optimal on A. Moving index `k` to the other side, whichever it is on, changes
`T` by one rank-one matrix and the quadratic by exactly `−½ y_k² / T_kk`: that is the cost of
Optimal Brain Surgeon for a removal, and the gain of a weight that comes back.
(Goodnight: "A Tutorial on the SWEEP Operator", The American Statistician 33, 1979.)
"""

from __future__ import annotations

import torch

# Rank-one changes gathered before they are applied as one matrix product: a product of this
# width runs at the speed of the processor, a single rank-one update at that of the memory.
WIDTH = 32


def rows_at_once(inputs: int) -> int:
    """Return how many rows' tableaux of this order fit 128 MiB."""
    return max(1, 2**25 // inputs**2)


class Tableaux:
    """One tableau a row, `(rows, in, in)`, in factored form: base minus pending changes.

    A move costs `in · pending` and its share of a flush, `in²`.

    Args:
        base: `T`, `(in, in)`, the same for every row: `H` where all weights are removed,
            `−H⁻¹` where all are kept.
        y: `(rows, in)`, what goes with it: `w H` or `w`.

    Attributes:
        kept: `(rows, in)` bool, the set A.
        diagonal: `T_kk`, `(rows, in)`; negative where the weight is kept, but for rounding.
        y: `(rows, in)`, the kept weights and the descent directions of the removed ones.
        index: `(rows, in)`, which input each column is.
    """

    def __init__(self, base: torch.Tensor, y: torch.Tensor) -> None:
        rows, inputs = y.shape
        self.diagonal = base.diagonal().expand(rows, inputs).clone()
        self.kept = self.diagonal < 0
        self.y = y.clone()
        self.index = torch.arange(inputs, device=y.device).expand(rows, inputs)
        self._base = base.expand(rows, inputs, inputs)
        self._shared = True  # still the one matrix that was given
        self._panel = y.new_empty(rows, WIDTH, inputs)
        self._signs = y.new_empty(rows, WIDTH)
        self._pending = 0
        self._rows = torch.arange(rows, device=y.device)

    def columns(self, which: torch.Tensor) -> torch.Tensor:
        """Return columns `which`, `(rows, c)`, of every row's `T`, as `(rows, c, in)`.

        Entries on the diagonal are meaningless; `diagonal` has them.
        """
        found = self._base[self._rows[:, None], which]
        if self._pending:
            panel = self._panel[:, : self._pending]
            parts = panel.gather(2, which[:, None].expand(-1, self._pending, -1))
            parts = parts * self._signs[:, : self._pending, None]
            found = torch.baddbmm(found, parts.mT, panel, alpha=-1.0)
        return found

    def blocks(self, size: int) -> torch.Tensor:
        """Return the blocks of `size` along the diagonal of `T`, `(rows, in/size, size, size)`.

        Entries on the diagonal are meaningless; `diagonal` has them.
        """
        self.flush()
        split = self._base.unflatten(2, (-1, size)).unflatten(1, (-1, size))
        return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).clone()

    def move(
        self, which: torch.Tensor, active: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Move one index of each row, `(rows,)`, to its other side.

        Args:
            which: the index of each row.
            active: rows that take part, `(rows,)` bool; by default all.

        Returns:
            `u`, `(rows, in)`, and `s`, `(rows, 1)`, 1 or −1: off the diagonal `T` became
            `T − s u uᵀ`.
        """
        if self._pending == WIDTH:
            self.flush()
        at = which[:, None]
        pivot = self.diagonal.gather(1, at)
        value = self.y.gather(1, at)
        change = self.columns(at).squeeze(1)
        # This entry makes row k of the change turn T_ik into ±T_ik / T_kk.
        change.scatter_(1, at, pivot - pivot.sign())
        if active is not None:
            change *= active[:, None]
        self.y -= change * (value / pivot)
        change *= pivot.abs().rsqrt()
        sign = pivot.sign()
        moved = -1.0 / pivot
        if active is not None:
            moved = torch.where(active[:, None], moved, pivot)
        self.diagonal -= change.square() * sign
        self.diagonal.scatter_(1, at, moved)
        flip = True if active is None else active[:, None]
        self.kept.scatter_(1, at, self.kept.gather(1, at) ^ flip)
        self._panel[:, self._pending] = change
        self._signs[:, self._pending] = sign.squeeze(1)
        self._pending += 1
        return change, sign

    def flush(self) -> None:
        """Apply the pending changes to the base."""
        panel = self._panel[:, : self._pending]
        left = (panel * self._signs[:, : self._pending, None]).mT
        if self._shared:
            self._base = torch.baddbmm(self._base, left, panel, alpha=-1.0)
            self._shared = False
        else:
            self._base.baddbmm_(left, panel, alpha=-1.0)
        self._pending = 0

    def narrow(self, columns: torch.Tensor) -> None:
        """Forget all but these columns, `(rows, c)`; only with no change pending.

        What remains is exact: a move changes an entry by its own two columns only.
        """
        assert not self._pending
        narrow = self._base.new_empty(*columns.shape, columns.shape[1])
        for old, new, kept in zip(self._base, narrow, columns, strict=True):
            torch.index_select(old.index_select(0, kept), 1, kept, out=new)
        self._base, self._shared = narrow, False
        self._panel = self._panel.new_empty(*self._panel.shape[:2], columns.shape[1])
        self.kept = self.kept.gather(1, columns)
        self.diagonal = self.diagonal.gather(1, columns)
        self.y = self.y.gather(1, columns)
        self.index = self.index.gather(1, columns)
