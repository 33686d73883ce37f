"""Which activations have a row for each position of the padding mask: decided by data flow.

Shapes alone do not tell: a decoder's rows may be as many as the mask's positions, and so may a
batch's sentences or an attention's heads. So the lengths of all inputs get names of their own, and
symbolic shape inference follows them through the graph; where the mask meets the activations that
it masks, their names become one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.runtime.data.open import PAD_MASK
from iobs_onnx.runtime.shapes import DECODER, Shape, infer_shapes, skeleton_of

_PAST = "past_key_values"
_TOKENS = ("input_ids", "inputs_embeds")


class Padding:
    """The padding mask of a model, `(batch, length)`, and the activations that it reaches.

    Args:
        model: has an input `attention_mask`; values are asked for by their names in its main graph.
    """

    name = PAD_MASK

    def __init__(self, model: ir.Model) -> None:
        self._model = model

    def over(self, mask: NDArray[np.bool_], value: str, shape: Sequence[int]) -> Any:
        """Return a mask over the first axis, or the first two, of one batch's activation.

        Args:
            mask: of the batch, True where a position counts.
            value: the activation's name.
            shape: of it.

        Returns:
            A boolean array, None where the activation has no such axes or that cannot be told.
        """
        lead = self._leads.get(value)
        if lead == 2 and len(shape) > 2 and tuple(shape[:2]) == mask.shape:
            return mask
        if lead == 1 and len(shape) == 2 and shape[0] == mask.size:
            return mask.reshape(-1)
        return None

    def reaches(self, value: str) -> bool:
        """Whether the first two axes of an activation are the mask's."""
        return self._leads.get(value) == 2

    @cached_property
    def _leads(self) -> dict[str, int]:
        """Return how many leading axes of each activation are those of the mask."""
        skeleton = skeleton_of(self._model)
        shapes = infer_shapes(skeleton, apart=True)
        names = [value.name or "" for value in self._model.graph.inputs]
        if not _meets(shapes, names):  # the exporter's names are all there is
            shapes = infer_shapes(skeleton, apart=False)
        axes = [shapes[name] for name in _sources(shapes) if len(shapes[name]) == 2]
        found: dict[str, int] = {}
        for name in names:
            if any(_leading(shapes.get(name, []), pair, shapes) for pair in axes):
                found[name] = 2
        for node in self._model.graph:
            follows = any(value is not None and value.name in found for value in node.inputs)
            for value in node.outputs:
                shape = shapes.get(value.name or "", [])
                if any(_leading(shape, pair, shapes) for pair in axes):
                    found[value.name or ""] = 2
                elif follows and any(_merged(shape, pair) for pair in axes):
                    found[value.name or ""] = 1
        return found


def find_padding(model: ir.Model) -> Padding | None:
    """Return the padding mask of a model, None where it has no input `attention_mask`."""
    names = {value.name for value in model.graph.inputs}
    return Padding(model) if PAD_MASK in names else None


def _sources(shapes: Mapping[str, Shape]) -> list[str]:
    """Return the inputs whose two axes are those of the mask.

    A mask beside a cache covers the past too; while there is none, it is as long as the tokens.
    """
    cached = any(name.startswith(_PAST) for name in shapes)
    tokens = [name for name in _TOKENS if name in shapes] if cached else []
    return [name for name in (PAD_MASK, *tokens) if name in shapes]


def _meets(shapes: Mapping[str, Shape], inputs: Sequence[str]) -> bool:
    """Whether the mask's length is that of another input."""
    length = shapes.get(PAD_MASK, [0])[-1]
    others = (shapes.get(name, []) for name in inputs if name != PAD_MASK)
    return isinstance(length, int) or any(length in shape for shape in others)


def _leading(shape: Shape, pair: Shape, shapes: Mapping[str, Shape]) -> bool:
    """Whether the first two axes are batch and length; numbers must not be ambiguous."""
    if shape[:2] != pair:
        return False
    batch, length = pair
    if isinstance(length, str):
        return True
    decodes = any(name.startswith(DECODER) for name in shapes)
    return batch != length and not decodes and not (len(shape) > 3 and shape[2] == length)


def _merged(shape: Shape, pair: Shape) -> bool:
    """Whether the first of two axes has batch and length in one."""
    if len(shape) != 2:
        return False
    batch, length = pair
    if isinstance(batch, int) and isinstance(length, int):
        return shape[0] == batch * length
    return shape[0] == length if batch == 1 else _factors(shape[0]) == _factors(*pair)


def _factors(*sizes: int | str) -> list[str]:
    return sorted(factor for size in sizes for factor in str(size).split("*"))
