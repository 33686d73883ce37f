"""Which stored tensors distillation trains, and their float32 masters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from iobs_onnx.errors import ModelError
from iobs_onnx.passes import masks_of, stored_slots
from iobs_onnx.site import Site

Mask = NDArray[np.bool_]

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
# Operators with scales, offsets and biases, and the inputs that hold them; None for any input.
# The running mean and variance of a BatchNormalization are statistics, not parameters.
_SMALL: dict[str, tuple[int, ...] | None] = {
    "Add": None,
    "Sub": None,
    "Mul": None,
    "Div": None,
    "Gemm": (2,),
    "FusedGemm": (2,),
    "Conv": (2,),
    "FusedConv": (2,),
    "ConvTranspose": (2,),
    "PRelu": (1,),
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3, 4),
    "SkipSimplifiedLayerNormalization": (2, 3),
    "EmbedLayerNormalization": (5, 6),
    "BiasGelu": (1,),
    "FastGelu": (1,),
    "BiasAdd": (1,),
    "BiasSplitGelu": (1,),
    "Attention": (2,),
    "QAttention": (),
    "MultiHeadAttention": (3,),
}
_MICROSOFT_ONLY = frozenset({"Attention", "MultiHeadAttention"})


@dataclass(frozen=True)
class Master:
    """A tensor in training.

    Attributes:
        name: of the stored tensor.
        value: float32, a leaf that requires its gradient.
        mask: float32 ones and zeros in its shape; None where all of it is trained.
        dtype: as it is stored.
    """

    name: str
    value: Tensor
    mask: Tensor | None
    dtype: ir.DataType

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return self.value.numel() if self.mask is None else int(self.mask.sum())

    def rounded(self) -> Tensor:
        """Return the values as they would be stored, float32."""
        if self.dtype == ir.DataType.FLOAT:
            return self.value.detach()
        half = torch.float16 if self.dtype == ir.DataType.FLOAT16 else torch.bfloat16
        return self.value.detach().to(half).float()

    def stored(self) -> NDArray[np.generic]:
        """Return the values in the stored dtype, zeros outside the mask."""
        value = self.rounded().cpu()
        if self.mask is not None:
            value = torch.where(self.mask.cpu() != 0, value, 0.0)
        array: NDArray[np.generic] = value.numpy()
        if self.dtype == ir.DataType.FLOAT16:
            return array.astype(np.float16)
        if self.dtype == ir.DataType.BFLOAT16:
            return array.astype(ml_dtypes.bfloat16)
        return array.copy()


def kept_masks(model: ir.Model, sites: Iterable[Site]) -> dict[str, Mask]:
    """Return the masks of a model that was pruned elsewhere: kept is what is not zero.

    Args:
        model: the sparse model.
        sites: of it, from :func:`iobs_onnx.passes.find_sites`; those without a zero are left out,
            as nothing says that they were pruned.
    """
    pruned = masks_of(model, sites)
    return {name: mask for name, mask in pruned.items() if not mask.all()}


def masters(
    model: ir.Model,
    kept: Mapping[str, Mask],
    *,
    small: bool,
    embeddings: bool,
    weighed: Collection[str] = (),
) -> list[Master]:
    """Return all that is trained: tensors with masks, then biases and the like, then embeddings.

    A bias, scale or offset is a float tensor of the main graph with one axis longer than 1, that
    an operator reads as such beside something computed from a stored matrix. What meets only
    positions or the model's inputs (frequencies of rotary embeddings, the mean of an image) stays.

    Embeddings stay by default: the rows of tokens that the feeds lack would be judged by nobody,
    and a head that is tied to them moves with them.

    Args:
        model: the sparse one, or a part of it.
        kept: masks by name.
        small: train biases and the like.
        embeddings: train tables whose rows are looked up.
        weighed: inputs that stored matrices outside of this part made.

    Raises:
        ModelError: a mask names no float tensor of the model, or has another shape.
    """
    stored = stored_slots(model)
    chosen: dict[str, Mask | None] = {}
    for name, mask in kept.items():
        if name not in stored:
            raise ModelError(f"distillation: the sparse model stores no tensor {name!r}")
        tensor = stored[name].tensor
        if tensor.dtype not in FLOATS:
            raise ModelError(
                f"distillation: weight {name!r} is stored as {tensor.dtype.name}; only float "
                "weights can be trained; distil first and quantize afterwards"
            )
        if tuple(tensor.shape.numpy()) != mask.shape:
            raise ModelError(f"distillation: the mask of {name!r} has shape {mask.shape}")
        if np.any(np.asarray(tensor.numpy(), np.float32)[~mask]):
            raise ModelError(f"distillation: weight {name!r} is not zero where its mask removes it")
        chosen[name] = mask
    vectors = _small(model.graph, weighed) if small else ()
    names = [*vectors, *(_tables(model.graph) if embeddings else ())]
    for name in names:
        if name in stored and stored[name].tensor.dtype in FLOATS:
            chosen.setdefault(name, None)
    return [_master(name, stored[name].tensor, mask) for name, mask in chosen.items()]


def _master(name: str, tensor: ir.TensorProtocol, mask: Mask | None) -> Master:
    value = torch.from_numpy(np.array(tensor.numpy(), np.float32)).requires_grad_()
    ones = None if mask is None else torch.from_numpy(mask.astype(np.float32))
    return Master(name, value, ones, tensor.dtype)


def _small(graph: ir.Graph, made: Collection[str]) -> Iterator[str]:
    """Yield the names of biases, scales and offsets, in the order of the graph."""
    weighed = {value for value in graph.inputs if value.name in made}
    for node in graph:
        reads = [value for value in node.inputs if value is not None]
        if any(value in weighed or _is_matrix(value) for value in reads):
            weighed.update(node.outputs)
            yield from (value.name or "" for value in _parameters(node) if _is_vector(value))


def _parameters(node: ir.Node) -> list[ir.Value]:
    places = _SMALL.get(node.op_type, ())
    if node.op_type in _MICROSOFT_ONLY and node.domain != "com.microsoft":
        places = ()
    chosen = range(len(node.inputs)) if places is None else places
    found = [node.inputs[place] for place in chosen if place < len(node.inputs)]
    return [value for value in found if value is not None]


def _tables(graph: ir.Graph) -> Iterator[str]:
    """Yield the names of matrices whose rows are looked up."""
    for node in graph:
        if node.op_type != "Gather" or node.domain or node.inputs[0] is None:
            continue
        if _is_matrix(node.inputs[0]):
            yield node.inputs[0].name or ""


def _stored_shape(value: ir.Value) -> Collection[int] | None:
    """Return the shape of a stored float tensor, else None."""
    producer = value.producer()
    if value.is_graph_input():
        return None
    tensor = value.const_value if value.is_initializer() else None
    if producer is not None and producer.op_type == "Constant" and "value" in producer.attributes:
        tensor = producer.attributes["value"].as_tensor()
    if tensor is None or tensor.dtype not in FLOATS:
        return None
    return tuple(int(size) for size in tensor.shape.numpy())


def _is_matrix(value: ir.Value) -> bool:
    shape = _stored_shape(value)
    return shape is not None and sum(size > 1 for size in shape) >= 2


def _is_vector(value: ir.Value) -> bool:
    shape = _stored_shape(value)
    return shape is not None and sum(size > 1 for size in shape) == 1
