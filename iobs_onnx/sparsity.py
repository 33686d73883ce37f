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
            scores: `(..., in)`, any floating dtype, free of NaN, `in` a multiple of `m`. The
                mask has the memory layout of the scores.
        """
        groups = scores.unflatten(-1, (-1, self.m))
        if (self.n, self.m) == (2, 4):
            mask = groups >= _second_of_four(groups).unsqueeze(-1)
            if int(mask.count_nonzero()) * 2 == mask.numel():  # else there are ties
                return mask.flatten(-2)
        mask = _bool_like(groups)
        if self.m > _LARGEST_RANKED_GROUP:
            order = groups.argsort(dim=-1, descending=True, stable=True)
            mask.fill_(False).scatter_(-1, order[..., : self.n], True)
        else:
            for i, rank in enumerate(_ranks(groups)):
                mask[..., i] = rank < self.n
        return mask.flatten(-2)

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
        return top_mask(scores, self.keep(scores.numel()))

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
        return Unstructured(_fraction(float(text)))
    if pair := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text):
        return NM(int(pair[1]), int(pair[2]))
    if number := re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text):
        value = float(number[1])
        return Unstructured(value / 100.0 if number[2] else _fraction(value))
    raise OptionError(f"sparsity {text!r}: expected N:M (2:4), a fraction (0.7) or a percentage")


def _fraction(value: float) -> float:
    if 1.0 < value < 100.0:
        raise OptionError(
            f"sparsity {value:g}: the fraction removed must be in [0, 1); for a percentage write "
            f"{value:g}%"
        )
    return value


def top_mask(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Return the mask of the `keep` largest of all scores `(out, in)`; ties keep the first.

    The mask has the memory layout of the scores, which must be free of NaN.
    """
    if keep == 0:
        return _bool_like(scores).fill_(False)
    threshold = _kth_largest(scores, keep)
    mask = scores >= threshold
    if (excess := int(mask.count_nonzero()) - keep) > 0:
        ties = scores == threshold
        rows = ties.any(1).nonzero()[:, 0]  # few: torch is slow to list entries of a transpose
        places = ties[rows].nonzero()[-excess:]
        mask[rows[places[:, 0]], places[:, 1]] = False
    return mask


def _kth_largest(scores: torch.Tensor, k: int) -> float:
    """Selection on the CPU by NumPy, whose vectorised partition is many times faster."""
    index = scores.numel() - k
    if scores.device.type == "cpu":
        flat = np.ravel(scores.detach().numpy(), order="K")
        return float(np.partition(flat, index)[index])
    return float(scores.reshape(-1).kthvalue(index + 1).values)


def _second_of_four(groups: torch.Tensor) -> torch.Tensor:
    """Second largest along the last axis, in a third of the passes that ranking takes."""
    a, b, c, d = groups.unbind(-1)
    winners = a.maximum(b).minimum(c.maximum(d))
    losers = a.minimum(b).maximum(c.minimum(d))
    return winners.maximum(losers)


# Ranking by all pairs costs m(m-1)/2 vectorised comparisons, sorting a slow pass: they
# break even near 16.
_LARGEST_RANKED_GROUP = 16


def _ranks(groups: torch.Tensor) -> list[torch.Tensor]:
    """Rank of each entry in its group, 0 = largest; of equals the first ranks first."""
    entries = groups.unbind(-1)
    ranks = [_bool_like(entry).fill_(False).byte() for entry in entries]
    for i, left in enumerate(entries):
        for j in range(i + 1, len(entries)):
            left_wins = left >= entries[j]
            ranks[j] += left_wins
            ranks[i] += ~left_wins
    return ranks


def _bool_like(tensor: torch.Tensor) -> torch.Tensor:
    # torch takes 1.6 s to import; whoever holds a tensor has paid for it already.
    import torch

    return torch.empty_like(tensor, dtype=torch.bool)
