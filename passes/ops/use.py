"""The record an operator handler returns: how one node multiplies by its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from iobs_onnx.errors import ModelError
from iobs_onnx.passes.graph.layout import Layout
from iobs_onnx.site import RowForm
from iobs_onnx.site.grid import Packed


@dataclass(frozen=True)
class Read:
    """An activation that meets a weight.

    Attributes:
        value: the activation.
        form: how its rows are read.
        padded_by: the recurrent node whose `sequence_lens` says which of its steps count, None
            where all do.
    """

    value: ir.Value
    form: RowForm
    padded_by: ir.Node | None = None

    @property
    def tap(self) -> str:
        """Name of the value that is tapped, which `Handler.expose` may have to make."""
        name = called_value(self.value)
        if self.padded_by is None:
            return name
        return f"{name}/steps of {called_value(self.padded_by.outputs[0])}"


@dataclass(frozen=True)
class Use:
    """How one node multiplies by its weight operand.

    Attributes:
        reads: the activations that meet the weight.
        matrices: the operand as `W`: three axes, groups, outputs and inputs.
        quantized: what the integers of an operand that the node itself unpacks stand for.
    """

    reads: tuple[Read, ...]
    matrices: Layout
    quantized: Packed | None = None


@dataclass(frozen=True)
class Product:
    """A node that puts out input 0 times the weight at input 1, plus a bias, and nothing else.

    Axes are counted from the end.

    Attributes:
        channels: the axis of channels, in what the node reads and in what it makes.
        made: the weight's axis of the channels that are made.
        read: the weight's axis of the channels that are read.
        rank: of the weight.
        bias: the input that holds one number for each channel made; None where the operator has
            none, so that a bias is added by an Add behind it.
        groups: that channels are divided into; each makes its own.
        apart: whether every channel made is made of the channel read at the same place alone.
        transposed: whether the channels that are read lie on another axis than `channels`.
        scaled: whether the product or the bias is multiplied by a number other than 1.
        stacks: whether a weight of more axes than `rank` is a stack of such weights.
    """

    channels: int
    made: int
    read: int
    rank: int
    bias: int | None = None
    groups: int = 1
    apart: bool = False
    transposed: bool = False
    scaled: bool = False
    stacks: bool = False


Describe: TypeAlias = Callable[[ir.Node, int, Layout], Use | str]
Claim: TypeAlias = Callable[[str], str]


@dataclass(frozen=True)
class Handler:
    """What :data:`iobs_onnx.passes.ops.OP_HANDLERS` knows of an operator.

    Without the optional ones its weights are pruned all the same: biases stay as they are,
    channels are not reordered.

    Attributes:
        operands: the inputs that may be a weight.
        describe: maps node, index of the weight operand and that operand's layout to a `Use`,
            or to the reason why the weight cannot be pruned.
        product: maps a node and the rank of its weight to what a bias and the order of channels
            depend on; None where the operator is no plain product of two inputs.
        expose: puts values that taps of a node read, and the graph does not have, into a copy of
            the model; it is given the node and a function that claims a name.
        free_outputs: whether nothing has to follow where the outputs of a weight are stored in
            another order.
        no_kernel: why no known engine has 2:4 kernels for its weights, with `{op_type}` for its
            name; empty where they are treated as any matrix or convolution.
        packed: whether the node reads integers and unpacks them itself.
    """

    operands: tuple[int, ...]
    describe: Describe
    product: Callable[[ir.Node, int], Product] | None = None
    expose: Callable[[ir.Node, Claim], None] | None = None
    free_outputs: bool = False
    no_kernel: str = ""
    packed: bool = False


@dataclass(frozen=True)
class Unsupported:
    """An operator that multiplies by a weight but has no handler.

    Attributes:
        operands: the inputs that may be a weight.
        reason: why it has none.
    """

    operands: tuple[int, ...]
    reason: str


def operand(node: ir.Node, index: int) -> ir.Value:
    """Return input `index` of a node.

    Raises:
        ModelError: when the node lacks this input, which its operator requires.
    """
    value = optional(node, index)
    if value is None:
        raise ModelError(f"node {node.name!r}: {node.op_type} lacks input {index}; mend the model")
    return value


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """Return input `index` of a node, None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def called_value(value: ir.Value) -> str:
    """Return the name of a value; a nameless output, left out by its node, is called after it."""
    if value.name:
        return value.name
    node = value.producer()
    assert node is not None, "graph inputs and initializers have names"
    named = next((other.name for other in node.outputs if other.name), "")
    return f"{named}/output_{value.index()}"
