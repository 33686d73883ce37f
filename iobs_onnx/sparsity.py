"""Sparsity patterns: parse them, project onto them, check them.

Terms: a *mask* is boolean, True = kept; a matrix `W` is `(out, in)`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from iobs_onnx.errors import OptionError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class NM:
    """At most `n` weights **kept** in every `m` consecutive inputs, for each output."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise OptionError(f"sparsity {self}: N:M keeps N of M, so 0 < N <= M is required")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Fraction of the weights kept."""
        return self.n / self.m

    def misfit(self, run: int) -> str | None:
        """Say why a weight with `run` consecutive inputs cannot carry this pattern, or None."""
        if run % self.m:
            return f"{run} inputs along the reduction axis are not a multiple of {self.m}"
        return None

    def project(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the mask of the `n` largest scores in each group of `m`; ties keep the first.

        Args:
            scores: `(..., in)`, any floating dtype, `in` a multiple of `m`.
        """
        groups = scores.unflatten(-1, (-1, self.m))
        if 2 * self.n == self.m == 4:
            return _top_two_of_four(groups).flatten(-2)
        order = groups.argsort(dim=-1, descending=True, stable=True)
        mask = groups.new_zeros(groups.shape, dtype=_torch_bool())
        return mask.scatter_(-1, order[..., : self.n], True).flatten(-2)

    def violations(self, matrix: NDArray[np.generic]) -> int:
        """Count the groups of `m` consecutive inputs of `(..., in)` with over `n` non-zeros."""
        kept = np.count_nonzero(matrix.reshape(*matrix.shape[:-1], -1, self.m), axis=-1)
        return int(np.count_nonzero(kept > self.n))


@dataclass(frozen=True)
class Unstructured:
    """`fraction` of the weights of a matrix removed, wherever they stand."""

    fraction: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction < 1.0:
            raise OptionError(f"sparsity {self.fraction:g}: the fraction removed must be in [0, 1)")

    def __str__(self) -> str:
        return f"{self.fraction:g}"

    @property
    def density(self) -> float:
        """Fraction of the weights kept."""
        return 1.0 - self.fraction

    def keep(self, size: int) -> int:
        """Return how many of `size` weights are kept: size minus round(fraction · size)."""
        return size - round(self.fraction * size)

    def misfit(self, run: int) -> str | None:
        """Every matrix can carry an unstructured pattern."""
        return None

    def project(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the mask of the largest scores of the whole matrix `(out, in)`."""
        flat = scores.reshape(-1)
        mask = flat.new_zeros(flat.shape, dtype=_torch_bool())
        kept = flat.topk(self.keep(flat.numel()), sorted=False).indices
        return mask.index_fill_(0, kept, True).reshape(scores.shape)

    def violations(self, matrix: NDArray[np.generic]) -> int:
        """Count the non-zero weights beyond the number this pattern keeps."""
        return max(0, int(np.count_nonzero(matrix)) - self.keep(matrix.size))


Pattern: TypeAlias = NM | Unstructured


def parse_sparsity(text: str | float | Pattern) -> Pattern:
    """Read `"2:4"`, any `"N:M"`, `"0.7"`, `"70%"` or a number in [0, 1).

    Raises:
        OptionError: for anything else.
    """
    if isinstance(text, NM | Unstructured):
        return text
    if isinstance(text, int | float):
        return Unstructured(float(text))
    if pair := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text):
        return NM(int(pair[1]), int(pair[2]))
    if number := re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text):
        return Unstructured(float(number[1]) / (100.0 if number[2] else 1.0))
    raise OptionError(f"sparsity {text!r}: expected N:M (2:4), a fraction (0.7) or a percentage")


def _top_two_of_four(groups: torch.Tensor) -> torch.Tensor:
    """Mask of the two largest of each four, by six comparisons: sorting is 20 times slower.

    An entry is kept when it loses to at most one other; of equals the first wins.
    """
    import torch

    a, b, c, d = groups.unbind(-1)
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    keep_a = (ab & (ac | ad)) | (ac & ad)
    keep_b = (~ab & (bc | bd)) | (bc & bd)
    keep_c = (~ac & (~bc | cd)) | (~bc & cd)
    keep_d = (~ad & (~bd | ~cd)) | (~bd & ~cd)
    return torch.stack((keep_a, keep_b, keep_c, keep_d), dim=-1)


def _torch_bool() -> torch.dtype:
    # torch takes 1.6 s to import; whoever holds a tensor has paid for it already.
    import torch

    return torch.bool
