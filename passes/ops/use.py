"""The record an operator handler returns: how one node multiplies by its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from iobs_onnx.errors import ModelError
from iobs_onnx.passes.graph.layout import Layout
from iobs_onnx.site import RowForm


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


@dataclass(frozen=True)
class Use:
    """How one node multiplies by its weight operand.

    Attributes:
        reads: the activations that meet the weight.
        matrices: the operand as `W`: three axes, groups, outputs and inputs.
    """

    reads: tuple[Read, ...]
    matrices: Layout


Describe: TypeAlias = Callable[[ir.Node, int, Layout], Use | str]


@dataclass(frozen=True)
class Handler:
    """What :data:`iobs_onnx.passes.ops.OP_HANDLERS` knows of an operator.

    Attributes:
        operands: the inputs that may be a weight.
        describe: maps node, index of the weight operand and that operand's layout to a `Use`,
            or to the reason why the weight cannot be pruned.
    """

    operands: tuple[int, ...]
    describe: Describe


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
