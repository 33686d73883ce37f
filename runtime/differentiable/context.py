"""What an operator's function is told of its node, beside the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import onnx_ir as ir
import torch
from torch import Tensor

from iobs_onnx.errors import ModelError
from iobs_onnx.runtime.differentiable.dtypes import Precision, torch_type

Result: TypeAlias = Tensor | tuple[Tensor | None, ...]
Operator: TypeAlias = Callable[..., Result]


class Body(Protocol):
    """A graph that a node runs: a branch, or the body of a loop."""

    @property
    def inputs(self) -> int:
        """How many arguments it takes."""

    def __call__(self, arguments: Sequence[Tensor], captured: Sequence[Tensor]) -> list[Tensor]:
        """Run it; `captured` are the node's inputs beyond its own, in their order."""


@dataclass(frozen=True)
class Context:
    """One node, read when the evaluator is constructed.

    Attributes:
        name, domain, op_type: of the node; `ai.onnx` is the empty domain.
        version: of the operator set that the model imports for the domain.
        outputs: how many outputs the node names.
        operands: how many inputs it has; inputs after them are captured by its bodies.
        attributes: name to int, float, str, tuple of these, or Tensor.
        bodies: attribute name to graph.
        types: element types of the inputs as the model declares them, None where it does not.
        given: for each input whether it is there.
        memo: what a function keeps of one call for the next.
        precision: in which types floats are computed.
    """

    name: str
    domain: str
    op_type: str
    version: int
    outputs: int
    operands: int
    attributes: Mapping[str, Any]
    precision: Precision = "own"
    bodies: Mapping[str, Body] = field(default_factory=dict)
    types: tuple[ir.DataType | None, ...] = ()
    given: tuple[bool, ...] = ()
    memo: dict[str, Any] = field(default_factory=dict)

    def integer(self, name: str, default: int) -> int:
        """Return an attribute that is one integer."""
        value: int = self.attributes.get(name, default)
        return value

    def number(self, name: str, default: float) -> float:
        """Return an attribute that is one float."""
        value: float = self.attributes.get(name, default)
        return value

    def text(self, name: str, default: str) -> str:
        """Return an attribute that is one string."""
        value: str = self.attributes.get(name, default)
        return value

    def integers(self, name: str) -> tuple[int, ...] | None:
        """Return an attribute that is a list of integers, None where it is absent."""
        return self.attributes.get(name)

    def present(self, place: int) -> bool:
        """Whether the node has this input."""
        return place < len(self.given) and self.given[place]

    def dtype(self, code: int) -> torch.dtype:
        """Return the torch type for an ONNX element type.

        Raises:
            ModelError: torch has none.
        """
        return torch_type(code, self.precision)

    @property
    def label(self) -> str:
        """The node and its operator, for messages."""
        operator = f"{self.domain or 'ai.onnx'}::{self.op_type}"
        return f"node {self.name!r} ({operator})"

    def error(self, reason: str) -> ModelError:
        """Return an error that names the node and the reason."""
        return ModelError(f"{self.label}: {reason}")
