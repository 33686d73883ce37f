"""Where the elements of an operand lie in the tensor it is stored as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import TypeAlias

# Length and stride, in elements of the stored tensor. Axes of length 1 have no factor.
Factor: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """The axes of an operand, each as factors of the stored tensor, the outermost first.

    Transposes reorder axes and reshapes cut or join them; neither moves an element twice, so a
    chain of them is always `stored.reshape(view).transpose(perm).reshape(shape)`.
    """

    axes: tuple[tuple[Factor, ...], ...]

    @classmethod
    def of(cls, shape: Sequence[int]) -> Layout:
        """Return the layout of the stored tensor itself; no length may be 0."""
        strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
        pairs = zip(shape, strides, strict=True)
        return cls(tuple(((size, stride),) if size > 1 else () for size, stride in pairs))

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of every axis."""
        return tuple(prod(size for size, _ in factors) for factors in self.axes)

    def transpose(self, order: Sequence[int]) -> Layout:
        """Return the layout with its axes in another order."""
        return Layout(tuple(self.axes[axis] for axis in order))

    def reshape(self, shape: Sequence[int]) -> Layout | None:
        """Return the layout in another shape; None where an axis would mix parts of others."""
        if prod(shape) != prod(self.shape):
            return None
        left = list(_merged(chain(*self.axes)))
        axes: list[tuple[Factor, ...]] = []
        for length in reversed(shape):
            parts: list[Factor] = []
            while (lacking := length // prod(size for size, _ in parts)) > 1:
                size, stride = left.pop()
                if lacking % size and size % lacking:
                    return None
                if size > lacking:
                    left.append((size // lacking, stride * lacking))
                parts.append((min(size, lacking), stride))
            axes.append(tuple(reversed(parts)))
        return Layout(tuple(reversed(axes)))

    def split(self, axis: int, count: int) -> Layout | None:
        """Return the layout with `axis` cut in `count` parts: a new axis before it."""
        shape = list(self.shape)
        shape[axis : axis + 1] = [count, shape[axis] // count]
        return self.reshape(shape)

    def join(self, *groups: Sequence[int]) -> Layout:
        """Return the layout whose axes are the given groups of this one's, each flattened."""
        return Layout(tuple(tuple(chain(*(self.axes[axis] for axis in g))) for g in groups))

    def simplest(self) -> Layout:
        """Return the layout with as few factors as it can have; equal layouts become equal."""
        return Layout(tuple(tuple(_merged(factors)) for factors in self.axes))

    def view(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return `view` and `perm`: `stored.reshape(view).transpose(perm)` has these factors."""
        factors = list(chain(*self.axes))
        order = sorted(range(len(factors)), key=lambda i: -factors[i][1])
        place = {factor: index for index, factor in enumerate(order)}
        return tuple(factors[i][0] for i in order), tuple(place[i] for i in range(len(factors)))


def _merged(factors: chain[Factor] | Sequence[Factor]) -> list[Factor]:
    """Join neighbours that are one run of the stored tensor."""
    result: list[Factor] = []
    for size, stride in factors:
        run = result and result[-1][1] == size * stride
        result.append((size * result.pop()[0], stride) if run else (size, stride))
    return result
