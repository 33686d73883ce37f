"""A graph as a list of steps over numbered values, with what is constant computed once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from iobs_onnx.errors import IobsError, ModelError
from iobs_onnx.runtime.differentiable.context import Context, Operator
from iobs_onnx.runtime.differentiable.dtypes import Precision, constant
from iobs_onnx.runtime.differentiable.operators import OPERATORS, RANDOM

# Errors that torch and Python raise where inputs do not fit an operator.
_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError, ArithmeticError)


@dataclass(frozen=True, slots=True)
class Step:
    """One node: values are numbered, 0 stands for an input that is left out."""

    function: Operator
    context: Context
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    release: tuple[int, ...] = ()


def execute(steps: Sequence[Step], values: list[Tensor | None]) -> None:
    """Run steps over `values`, in place; a value is dropped after its last reader.

    Raises:
        ModelError: a node cannot be evaluated; names it and says why.
    """
    for step in steps:
        try:
            result = step.function(step.context, *[values[place] for place in step.inputs])
        except IobsError as error:
            if step.context.label in str(error):
                raise
            raise step.context.error(str(error)) from error
        except _FAILURES as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise step.context.error(reason) from error
        if isinstance(result, Tensor):
            values[step.outputs[0]] = result
        else:
            for place, output in zip(step.outputs, result, strict=False):
                values[place] = output
        for place in step.release:
            values[place] = None


@dataclass(frozen=True)
class Program:
    """Steps that lead from some values of a graph to others.

    Attributes:
        inputs: values that must be supplied, in order.
        constants: number to tensor.
        steps: in the order of the graph.
        outputs: numbers of the values that are wanted.
        size: how many numbers there are.
    """

    inputs: tuple[ir.Value, ...]
    constants: Mapping[int, Tensor]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    size: int

    def values(self, arguments: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the values at the start: arguments (numbers 1 to n) and constants."""
        values: list[Tensor | None] = [None, *arguments]
        values.extend([None] * (self.size - len(values)))
        for place, value in self.constants.items():
            values[place] = value
        return values

    def run(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        """Return the wanted values.

        Raises:
            ModelError: a node cannot be evaluated.
        """
        values = self.values(arguments)
        execute(self.steps, values)
        return self.wanted(values)

    def wanted(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        """Pick the outputs out of all values."""
        found = [value for place in self.outputs if (value := values[place]) is not None]
        if len(found) < len(self.outputs):
            raise ModelError("an output of the graph is one that its node does not give here")
        return found


@dataclass(frozen=True)
class ProgramBody:
    """A body with the places of what it captures among the node's captured inputs."""

    program: Program
    inputs: int
    places: tuple[int, ...]

    def __call__(self, arguments: Sequence[Tensor], captured: Sequence[Tensor]) -> list[Tensor]:
        """Run the body."""
        return self.program.run([*arguments, *(captured[place] for place in self.places)])


class Builder:
    """Makes programs of a model's graphs.

    Args:
        versions: operator set version for each domain.
        precision: in which types floats are computed.
        constants: what is computed already, and where more is kept.
        supplied: values that are supplied although the graph has or makes them.
    """

    def __init__(
        self,
        versions: Mapping[str, int],
        precision: Precision,
        constants: dict[ir.Value, Tensor],
        supplied: Collection[ir.Value] = (),
    ) -> None:
        self._versions = versions
        self._precision = precision
        self._constants = constants
        self._supplied = frozenset(supplied)

    def constant(self, value: ir.Value) -> Tensor:
        """Return an initializer as a tensor, the same one each time.

        Raises:
            ModelError: it has no value, or an element type that torch lacks.
        """
        if value not in self._constants:
            if value.const_value is None:
                raise ModelError(f"initializer {value.name!r} has no value")
            self._constants[value] = constant(value.const_value, self._precision)
        return self._constants[value]

    def build(
        self, graph: ir.Graph, outputs: Sequence[ir.Value], *, every_input: bool = False
    ) -> Program:
        """Return the program from graph inputs, what is supplied and captured, to `outputs`.

        Inputs of the graph that nothing needs are left out unless `every_input`.

        Every node that depends on constants alone is evaluated here, once.

        Raises:
            ModelError: a node cannot be evaluated, or reads a value that nobody makes.
        """
        nodes = self._needed(graph, outputs)
        needed = {value for node in nodes for value in self._reads(node)} | set(outputs)
        made = {output for node in nodes for output in node.outputs} - self._supplied
        initializers = set(graph.initializers.values()) - self._supplied
        inputs = [v for v in graph.inputs if v not in initializers]
        inputs = inputs if every_input else [value for value in inputs if value in needed]
        # What a body reads of the graphs around it, and what replaces a constant.
        inputs += sorted(
            needed - made - initializers - set(inputs), key=lambda value: value.name or ""
        )
        numbers = {value: place for place, value in enumerate(inputs, 1)}
        constants = {value: self.constant(value) for value in needed & initializers}
        steps: list[Step] = []
        for node in nodes:
            reads = self._reads(node)
            frozen = (node.domain, node.op_type) not in RANDOM
            if frozen and all(value in constants for value in reads):
                self._fold(node, constants)
                continue
            for value in (*(value for value in reads if value in constants), *node.outputs):
                numbers.setdefault(value, len(numbers) + 1)
            steps.append(self._step(node, numbers))
        for value in outputs:
            numbers.setdefault(value, len(numbers) + 1)
        kept = {numbers[v]: tensor for v, tensor in constants.items() if v in numbers}
        wanted = tuple(numbers[value] for value in outputs)
        return Program(
            tuple(inputs),
            kept,
            tuple(_released(steps, {*wanted, *kept})),
            wanted,
            len(numbers) + 1,
        )

    def _fold(self, node: ir.Node, constants: dict[ir.Value, Tensor]) -> None:
        if not all(output in self._constants for output in node.outputs):
            reads = self._reads(node)
            places = {value: place for place, value in enumerate({*reads, *node.outputs}, 1)}
            values: list[Tensor | None] = [None] * (len(places) + 1)
            for value in reads:
                values[places[value]] = constants[value]
            # Autograd cannot save tensors that were made in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                execute([self._step(node, places)], values)
            for output in node.outputs:
                tensor = values[places[output]]
                if tensor is not None:
                    self._constants[output] = tensor
        for output in node.outputs:
            if output in self._constants:
                constants[output] = self._constants[output]

    def _step(self, node: ir.Node, numbers: Mapping[ir.Value, int]) -> Step:
        captured = list(self._captured(node))
        context = self.context(node)
        bodies = {}
        for attribute, graph in _bodies(node):
            program = self.build(graph, list(graph.outputs), every_input=True)
            beyond = program.inputs[len(graph.inputs) :]
            places = tuple(captured.index(value) for value in beyond)
            bodies[attribute] = ProgramBody(program, len(graph.inputs), places)
        if bodies:
            context = replace(context, bodies=bodies)
        inputs = [0 if value is None else numbers[value] for value in node.inputs]
        inputs += [numbers[value] for value in captured]
        outputs = tuple(numbers[value] for value in node.outputs)
        return Step(OPERATORS[node.domain, node.op_type], context, tuple(inputs), outputs)

    def context(self, node: ir.Node) -> Context:
        """Read a node.

        Raises:
            ModelError: an attribute holds an element type that torch lacks.
        """
        attributes = {
            name: self._attribute(attribute)
            for name, attribute in node.attributes.items()
            if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        }
        return Context(
            node.name or (node.outputs[0].name if node.outputs else None) or "",
            node.domain,
            node.op_type,
            self._versions.get(node.domain, 1),
            len(node.outputs),
            len(node.inputs),
            attributes,
            self._precision,
            types=tuple(None if value is None else value.dtype for value in node.inputs),
            given=tuple(value is not None for value in node.inputs),
        )

    def _needed(self, graph: ir.Graph, outputs: Sequence[ir.Value]) -> list[ir.Node]:
        """Return the nodes that lead to `outputs`, in the order of the graph."""
        wanted = set(outputs) - self._supplied
        nodes = []
        for node in reversed(graph):
            if not wanted.isdisjoint(node.outputs):
                nodes.append(node)
                wanted.update(value for value in self._reads(node) if value not in self._supplied)
        return nodes[::-1]

    def _reads(self, node: ir.Node) -> list[ir.Value]:
        """Return what a node reads, with what its bodies capture."""
        return [*(value for value in node.inputs if value is not None), *self._captured(node)]

    def _captured(self, node: ir.Node) -> dict[ir.Value, None]:
        """Return what a node's bodies read of graphs around them or of what is supplied."""
        found: dict[ir.Value, None] = {}
        for _, graph in _bodies(node):
            own = {*graph.inputs, *graph.initializers.values()} - self._supplied
            for inner in graph:
                found.update(dict.fromkeys(v for v in self._reads(inner) if v not in own))
                own.update(output for output in inner.outputs if output not in self._supplied)
            found.update(dict.fromkeys(v for v in graph.outputs if v not in own))
        return found

    def _attribute(self, attribute: ir.Attr) -> Any:
        if attribute.type == ir.AttributeType.TENSOR:
            return constant(attribute.as_tensor(), self._precision)
        value = attribute.value
        return tuple(value) if isinstance(value, list) else value


def _bodies(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.as_graph()


def _released(steps: Sequence[Step], kept: Collection[int]) -> Iterator[Step]:
    """Yield the steps with the values that each is the last to read or never read."""
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        for place in (*step.inputs, *step.outputs):
            last[place] = index
    for index, step in enumerate(steps):
        places = {*step.inputs, *step.outputs} - {0}
        done = tuple(sorted(p for p in places if last[p] == index and p not in kept))
        yield replace(step, release=done)
