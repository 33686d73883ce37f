"""Which activations have a row for each position of the padding mask: decided by data flow.

Shapes alone do not tell: a decoder's rows may be as many as the mask's positions, and so may a
batch's sentences or an attention's heads. So the lengths of all inputs get names of their own, and
symbolic shape inference follows them through the graph; where the mask meets the activations that
it masks, their names become one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.errors import silenced
from iobs_onnx.runtime.data.open import PAD_MASK

# An axis is as long as a number says, or as a name or an expression of names.
_Shape: TypeAlias = list[int | str]

# Larger tensors decide no shape.
_MOST_BYTES = 1024
_PAST = "past_key_values"
_DECODER = "decoder_"
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
        skeleton = _skeleton(self._model)
        shapes = _infer(skeleton, apart=True)
        names = [value.name or "" for value in self._model.graph.inputs]
        if not _meets(shapes, names):  # the exporter's names are all there is
            shapes = _infer(skeleton, apart=False)
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


def _sources(shapes: Mapping[str, _Shape]) -> list[str]:
    """Return the inputs whose two axes are those of the mask.

    A mask beside a cache covers the past too; while there is none, it is as long as the tokens.
    """
    cached = any(name.startswith(_PAST) for name in shapes)
    tokens = [name for name in _TOKENS if name in shapes] if cached else []
    return [name for name in (PAD_MASK, *tokens) if name in shapes]


def _meets(shapes: Mapping[str, _Shape], inputs: Sequence[str]) -> bool:
    """Whether the mask's length is that of another input."""
    length = shapes.get(PAD_MASK, [0])[-1]
    others = (shapes.get(name, []) for name in inputs if name != PAD_MASK)
    return isinstance(length, int) or any(length in shape for shape in others)


def _leading(shape: _Shape, pair: _Shape, shapes: Mapping[str, _Shape]) -> bool:
    """Whether the first two axes are batch and length; numbers must not be ambiguous."""
    if shape[:2] != pair:
        return False
    batch, length = pair
    if isinstance(length, str):
        return True
    decodes = any(name.startswith(_DECODER) for name in shapes)
    return batch != length and not decodes and not (len(shape) > 3 and shape[2] == length)


def _merged(shape: _Shape, pair: _Shape) -> bool:
    """Whether the first of two axes has batch and length in one."""
    if len(shape) != 2:
        return False
    batch, length = pair
    if isinstance(batch, int) and isinstance(length, int):
        return shape[0] == batch * length
    return shape[0] == length if batch == 1 else _factors(shape[0]) == _factors(*pair)


def _factors(*sizes: int | str) -> list[str]:
    return sorted(factor for size in sizes for factor in str(size).split("*"))


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """Return a copy without large weights, which become inputs, and without inferred shapes."""
    copy = model.clone()
    for name, value in list(copy.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _MOST_BYTES:
            value.shape = ir.Shape(tensor.shape.numpy())
            value.type = ir.TensorType(tensor.dtype)
            value.const_value = None
            del copy.graph.initializers[name]
            if not value.is_graph_input():
                copy.graph.inputs.append(value)
    for node in copy.graph.all_nodes():
        for output in node.outputs:
            output.shape = None
    return ir.to_proto(copy)


def _infer(skeleton: onnx.ModelProto, *, apart: bool) -> dict[str, _Shape]:
    """Return the shapes of inputs and values of the main graph, as far as they can be told.

    Args:
        skeleton: unchanged by this call.
        apart: give every length of every input a name of its own; else only those of a decoder,
            and leave the exporter's.
    """
    from onnxruntime.tools.symbolic_shape_infer import (  # noqa: PLC0415 - imports sympy
        SymbolicShapeInference,
    )

    proto = onnx.ModelProto()
    proto.CopyFrom(skeleton)
    del proto.graph.value_info[:]
    for value in proto.graph.input:
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            own = apart or not size.dim_param or value.name.startswith(_DECODER)
            if size.dim_value <= 0 and own:
                size.dim_param = f"{value.name}.{axis}" if axis else "batch"
    # Not `infer_shapes`, which leaves a file in the working directory where it does not reach the
    # end of the graph. What it cannot follow is unknown, and keeps its rows.
    walker = SymbolicShapeInference(2**31 - 1, True, False, 0)
    with silenced("onnxruntime.tools.symbolic_shape_infer"), _unknown_beyond():
        walker._preprocess(proto)
        while walker.run_:
            walker._infer_impl()
    return {
        name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for name, value in walker.known_vi_.items()
    }


@contextmanager
def _unknown_beyond() -> Iterator[None]:
    """Stop where inference stumbles: on an operator that it does not know it raises whatever."""
    try:
        yield
    except Exception:
        logging.getLogger(__name__).debug("symbolic shape inference stopped", exc_info=True)
