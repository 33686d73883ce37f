"""Evaluate an ONNX graph in torch, so that gradients reach its inputs and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from torch import Tensor

from iobs_onnx.errors import ModelError
from iobs_onnx.runtime.differentiable.checkpoint import run_in_chunks
from iobs_onnx.runtime.differentiable.dtypes import TYPES, Precision, evaluated
from iobs_onnx.runtime.differentiable.operators import OPERATORS, refusal
from iobs_onnx.runtime.differentiable.program import Builder, Program


def unsupported(model: ir.Model) -> list[str]:
    """Say why a model cannot be evaluated; nothing is run.

    Returns:
        A reason for each node that stands in the way, with its operator and name; empty if the
        model can be evaluated.
    """
    model = _flat(model)
    builder = Builder(model.opset_imports, "own", {})
    return [
        *(f"input {v.name!r}: torch has no {v.type}" for v in _others(model)),
        *(reason for node in _nodes(model.graph) if (reason := _refused(node, builder))),
    ]


class Evaluator:
    """A model as a function of its inputs and of any of its constants.

    Nodes that depend on constants alone are computed once and kept: what leads from a weight to
    its reader (Transpose, Cast, DequantizeLinear) costs nothing while the weight is not replaced,
    and is differentiated through while it is.

    Args:
        model: left unchanged, and not to be changed while this lives.
        precision: `own` computes in the model's types; `float32` computes float16 and bfloat16 in
            float32 throughout, weights included; `float64` computes all three in float64.
        checkpoint: compute a chunk of nodes again for its gradient instead of keeping what lies
            within it: less memory for a second forward pass.

    Raises:
        ModelError: the model cannot be evaluated; names the first node and the reason.
    """

    def __init__(
        self, model: ir.Model, *, precision: Precision = "own", checkpoint: bool = False
    ) -> None:
        reasons = unsupported(model)
        if reasons:
            more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
            raise ModelError(f"the model cannot be evaluated in torch: {reasons[0]}{more}")
        self._model = _flat(model)
        self._precision = precision
        self._checkpoint = checkpoint
        self._constants: dict[ir.Value, Tensor] = {}
        self._programs: dict[tuple[tuple[str, ...], frozenset[str]], Program] = {}
        graph = self._model.graph
        self._values = {value.name or "": value for value in _values(graph)}
        self._replaceable = {value.name or "": value for value in _weights(graph)}
        self._initializers = Builder(self._model.opset_imports, precision, self._constants)

    def recomputing(self) -> Evaluator:
        """Return the same function, which keeps less for its gradient; see `checkpoint`."""
        other = copy(self)
        other._checkpoint = True
        return other

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs that a call must give."""
        return [v.name or "" for v in self._model.graph.inputs if not v.is_initializer()]

    @property
    def outputs(self) -> list[str]:
        """Names of the model's outputs."""
        return [value.name or "" for value in self._model.graph.outputs]

    def weight(self, name: str) -> Tensor:
        """Return an initializer, or what a Constant node holds, as it is evaluated.

        Raises:
            ModelError: there is no constant of this name.
        """
        value = self._constant(name)
        if value not in self._constants:
            if value.is_initializer():
                return self._initializers.constant(value)
            node = value.producer()
            assert node is not None
            result = OPERATORS["", "Constant"](self._initializers.context(node))
            assert isinstance(result, Tensor)
            self._constants[value] = result
        return self._constants[value]

    def __call__(
        self,
        inputs: Mapping[str, Tensor],
        weights: Mapping[str, Tensor] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Evaluate the model.

        Args:
            inputs: name to value.
            weights: name to what takes the place of an initializer or of what a Constant node
                holds. A float tensor may stand in for integers that are dequantized.
            outputs: names of values of the main graph; all outputs of the model by default.

        Returns:
            The values that were asked for, differentiable in whatever requires a gradient.

        Raises:
            ModelError: a name is not in the model, an input is missing, or a node cannot be
                evaluated on these values.
        """
        names = tuple(self.outputs if outputs is None else outputs)
        given = dict(inputs)
        given.update(weights or {})
        replaced = frozenset(name for name in given if name in self._replaceable)
        if weights is not None and not replaced.issuperset(weights):
            self._constant(next(name for name in weights if name not in replaced))
        program = self._programs.get((names, replaced))
        if program is None:
            program = self._programs[names, replaced] = self._program(names, replaced)
        arguments = []
        for value in program.inputs:
            argument = given.get(value.name or "")
            if argument is None:
                raise ModelError(f"input {value.name!r} of the model is missing")
            dtype = evaluated(argument.dtype, self._precision)
            arguments.append(argument if argument.dtype == dtype else argument.to(dtype))
        run = run_in_chunks if self._checkpoint else Program.run
        found = run(program, arguments)
        return {name: self._typed(name, value) for name, value in zip(names, found, strict=True)}

    def _program(self, names: Sequence[str], replaced: frozenset[str]) -> Program:
        missing = [name for name in names if name not in self._values]
        if missing:
            raise ModelError(f"the main graph has no value {missing[0]!r}")
        supplied = [self._replaceable[name] for name in replaced]
        builder = Builder(self._model.opset_imports, self._precision, self._constants, supplied)
        return builder.build(self._model.graph, [self._values[name] for name in names])

    def _constant(self, name: str) -> ir.Value:
        if name not in self._replaceable:
            raise ModelError(f"the model has no initializer or Constant node {name!r}")
        return self._replaceable[name]

    def _typed(self, name: str, value: Tensor) -> Tensor:
        """Give integers back where quantized values were computed as floats for the gradient."""
        declared = self._values[name].dtype
        if declared is None or not declared.is_integer() or not value.is_floating_point():
            return value
        return value.detach().round().to(TYPES[declared])


def _flat(model: ir.Model) -> ir.Model:
    """Return the model without functions of its own."""
    if not model.functions:
        return model
    copy = model.clone()
    common_passes.InlinePass()(copy)
    return copy


def _others(model: ir.Model) -> list[ir.Value]:
    """Return the inputs that are no tensors of types that torch has."""
    return [
        value
        for value in model.graph.inputs
        if value.type is not None
        and (not isinstance(value.type, ir.TensorType) or value.dtype not in TYPES)
    ]


def _refused(node: ir.Node, builder: Builder) -> str | None:
    key = (node.domain, node.op_type)
    label = f"node {node.name!r} ({node.domain or 'ai.onnx'}::{node.op_type})"
    if key not in OPERATORS:
        return f"{label}: there is no such operator here"
    try:
        context = builder.context(node)
    except ModelError as error:
        return f"{label}: {error}"
    reason = refusal(context)
    return f"{label}: {reason}" if reason else None


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield all nodes, those of bodies included; of an If that is decided, one branch."""
    for node in graph:
        yield node
        taken = _taken(node)
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.GRAPH and taken in (None, name):
                yield from _nodes(attribute.as_graph())


def _taken(node: ir.Node) -> str | None:
    """Return the branch of an If whose condition is a constant."""
    if node.op_type != "If" or node.inputs[0] is None or node.inputs[0].const_value is None:
        return None
    condition = bool(node.inputs[0].const_value.numpy().item())
    return "then_branch" if condition else "else_branch"


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _weights(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield initializers and values of Constant nodes; the outermost graph last, so it wins."""
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _weights(attribute.as_graph())
    yield from graph.initializers.values()
    for node in graph:
        if node.op_type == "Constant" and not node.domain:
            yield node.outputs[0]
