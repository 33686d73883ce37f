"""The record an operator handler returns: how one node multiplies by its weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from iobs_onnx.errors import ModelError
from iobs_onnx.site import RowForm


@dataclass(frozen=True)
class Use:
    """How one node multiplies by its weight operand, in the operand's own axes.

    Attributes:
        activation: the other operand; its rows are the regression's inputs.
        form: how those rows are read.
        perm: axes of the operand in the order output first, reduction last.
        axis: the axis of the operand along which a deployment engine groups 2:4.
        groups: number of independent products (grouped convolution), 1 otherwise.
    """

    activation: ir.Value
    form: RowForm
    perm: tuple[int, ...]
    axis: int
    groups: int = 1


Describe: TypeAlias = Callable[[ir.Node, int, tuple[int, ...]], Use | str]


@dataclass(frozen=True)
class Handler:
    """What :data:`iobs_onnx.passes.ops.OP_HANDLERS` knows of an operator.

    Attributes:
        operands: the inputs that may be a weight.
        describe: maps node, index of the weight operand and that operand's shape to a `Use`,
            or to the reason why the weight cannot be pruned.
    """

    operands: tuple[int, ...]
    describe: Describe


def operand(node: ir.Node, index: int) -> ir.Value:
    """Return input `index` of a node.

    Raises:
        ModelError: when the node lacks this input, which its operator requires.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise ModelError(f"node {node.name!r}: {node.op_type} lacks input {index}; mend the model")
    return value
