"""How far a pruned model's values can be from the dense model's, operator by operator.

The change of a value is `‖v − v'‖`, over all its elements and all calibration samples, `v` of the
dense model and `v'` of the pruned one. A site adds what its own weights change on the dense
model's inputs; each operator passes changes on, times at most a number that holds for every input.
For a chain of layers with 1-Lipschitz activations that is theorem 3.2 of Dong, Chen, Pan:
"Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain Surgeon" (NIPS 2017).
Differences:

1. The graph need not be a chain: where values are added or joined, so are their changes.
2. Weights count by their spectral norm, which is at most the paper's Frobenius norm.
3. Convolutions, pools and BatchNormalization count by a bound on their operator's norm.

Where an operator without a rule reads a changed value there is no bound, and the reason names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from iobs_onnx.passes.graph import names, walk
from iobs_onnx.passes.graph.attributes import integer, integers, text
from iobs_onnx.passes.graph.tensors import all_nodes, constant_array
from iobs_onnx.passes.ops.use import optional
from iobs_onnx.site import Site

Shapes: TypeAlias = Mapping[str, Sequence[int | str]]
# A bound on a change, or why there is none.
Change: TypeAlias = float | str

# More multiplications than this are not spent on one norm: a looser bound is taken.
_MOST_WORK = 2.0**31
_RANDOM = (
    *("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike"),
    *("RandomUniform", "RandomUniformLike"),
)
_EXACT = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


class _NoBound(Exception):
    """Why a node passes no bound on."""


@dataclass(frozen=True)
class _Read:
    """A node with the changes of what it reads, one an input, and the shapes that are known."""

    node: ir.Node
    changes: Sequence[float]
    shapes: Shapes
    own: float = 0.0

    def only(self, place: int = 0) -> float:
        """Return the change of one input; no other may change."""
        for other, change in enumerate(self.changes):
            if change and other != place:
                raise _NoBound(f"input {other} changes")
        return self.changes[place]

    def constant(self, place: int) -> NDArray[np.float64]:
        """Return the stored numbers at an input."""
        found = constant_array(optional(self.node, place))
        if found is None:
            raise _NoBound(f"input {place} is not a stored tensor")
        return found.astype(np.float64)

    def shape(self, place: int) -> Sequence[int | str]:
        """Return the shape of an input."""
        value = optional(self.node, place)
        assert value is not None, "inputs that are left out do not change"
        if (stored := constant_array(value)) is not None:
            return stored.shape
        if (found := self.shapes.get(value.name or "")) is None:
            raise _NoBound(f"the shape of {value.name!r} is not known")
        return found

    def require_no_copies(self) -> None:
        """Raise where an element of a changed input may be met by several of the others'."""
        for place, change in enumerate(self.changes):
            if not change:
                continue
            own = self.shape(place)
            for other in range(len(self.changes)):
                pairs = zip_longest(reversed(own), reversed(self.shape(other)), fillvalue=1)
                if any(b not in (1, a) and (isinstance(a, str) or a == 1) for a, b in pairs):
                    raise _NoBound(f"input {place} of shape {list(own)} may be broadcast")


Rule: TypeAlias = Callable[[_Read], float]


def _times(factor: float, read: _Read) -> float:
    return factor * read.only()


def _slope(default: float, read: _Read) -> float:
    """LeakyRelu, Elu: 1 above zero, at most alpha below."""
    return max(1.0, abs(read.node.attributes.get_float("alpha", default))) * read.only()


def _sum(read: _Read) -> float:
    """Operators whose result changes by no more than all of their operands together."""
    read.require_no_copies()
    return math.fsum(read.changes)


def _mul(read: _Read) -> float:
    place = 0 if read.changes[0] else 1
    change = read.only(place)
    read.require_no_copies()
    return float(np.abs(read.constant(1 - place)).max(initial=0.0)) * change


def _div(read: _Read) -> float:
    change = read.only()
    read.require_no_copies()
    least = float(np.abs(read.constant(1)).min(initial=np.inf))
    if least == 0.0:
        raise _NoBound("it divides by zero")
    return change / least


def _concat(read: _Read) -> float:
    return math.hypot(*read.changes)


def _cast(read: _Read) -> float:
    value = read.node.outputs[0]
    to = integer(read.node, "to", 0)
    if to not in _EXACT:
        raise _NoBound(f"it rounds {value.name!r} to {ir.DataType(to).name}")
    return read.only()


def _pad(read: _Read) -> float:
    if (mode := text(read.node, "mode", "constant")) != "constant":
        raise _NoBound(f"mode {mode} copies elements")
    return read.only()


def _dropout(read: _Read) -> float:
    mode = optional(read.node, 2)
    found = np.array(False) if mode is None else constant_array(mode)
    if found is None or found.any():
        raise _NoBound("training_mode draws random numbers")
    return read.only()


def _batch_norm(read: _Read) -> float:
    change = read.only()
    if integer(read.node, "training_mode", 0):
        raise _NoBound("training_mode divides by the batch's own spread")
    epsilon = read.node.attributes.get_float("epsilon", 1e-5)
    scale = read.constant(1) / np.sqrt(read.constant(4) + epsilon)
    return float(np.abs(scale).max(initial=0.0)) * change


def _product(norm: Callable[[ir.Node, NDArray[np.float64]], float], read: _Read) -> float:
    """Return the change of a product by a stored weight of this norm; alpha scales it."""
    change, weight = read.only(), read.constant(1)
    if read.node.op_type != "Conv" and weight.ndim != 2:
        raise _NoBound(f"its weight has {weight.ndim} axes")
    passed = norm(read.node, weight) * change if change else 0.0
    return abs(read.node.attributes.get_float("alpha", 1.0)) * (read.own + passed)


def _of_matrix(node: ir.Node, weight: NDArray[np.float64]) -> float:
    return spectral_norm(weight)


def _of_filters(node: ir.Node, weight: NDArray[np.float64]) -> float:
    groups = integer(node, "group", 1)
    kernel = weight.reshape(groups, -1, *weight.shape[1:])
    return convolution_norm(kernel, *_steps(node, weight.ndim - 2))


def _max_pool(read: _Read) -> float:
    if len(read.node.outputs) > 1 and read.node.outputs[1].uses():
        raise _NoBound("its second output, places, is read")
    return math.sqrt(_overlap(read.node)) * read.only()


def _average_pool(read: _Read) -> float:
    """Return the change of windows' means; one that hangs over an edge may hold 1 element."""
    node = read.node
    count = math.prod(integers(node, "kernel_shape", []))
    whole = not any(integers(node, "pads", [0])) or bool(integer(node, "count_include_pad", 0))
    whole = whole and text(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
    whole = whole and not integer(node, "ceil_mode", 0)
    return math.sqrt(_overlap(node) / (count if whole else 1)) * read.only()


def _steps(node: ir.Node, space: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return integers(node, "strides", [1] * space), integers(node, "dilations", [1] * space)


def _overlap(node: ir.Node) -> int:
    kernel = integers(node, "kernel_shape", [])
    return window_overlap(kernel, *_steps(node, len(kernel)))


_ONE: Rule = partial(_times, 1.0)
# Each of these moves elements, and none of them twice.
_MOVES = (
    "Flatten Identity Reshape Slice Split Squeeze Transpose Unsqueeze DepthToSpace SpaceToDepth"
)
_WITHIN_ONE = "Abs Atan Clip Cos Neg Relu Sin Softplus Softsign Tanh"
_MEANS = "GlobalAveragePool GlobalMaxPool ReduceMax ReduceMean ReduceMin"
RULES: dict[tuple[str, str], Rule] = {
    **{("", name): _ONE for name in f"{_MOVES} {_WITHIN_ONE} {_MEANS}".split()},
    **{("", name): _sum for name in ("Add", "Max", "Min", "Sub", "Sum")},
    # They read the shape, which is the dense model's.
    **{("", name): partial(_times, 0.0) for name in ("Shape", "Size")},
    ("", "AveragePool"): _average_pool,
    ("", "BatchNormalization"): _batch_norm,
    ("", "Cast"): _cast,
    ("", "Concat"): _concat,
    ("", "Conv"): partial(_product, _of_filters),
    ("", "Div"): _div,
    ("", "Dropout"): _dropout,
    ("", "Elu"): partial(_slope, 1.0),
    ("", "Erf"): partial(_times, 2 / math.sqrt(math.pi)),
    ("", "Gelu"): partial(_times, 1.13),
    ("", "Gemm"): partial(_product, _of_matrix),
    ("", "HardSwish"): partial(_times, 1.5),
    ("", "LeakyRelu"): partial(_slope, 0.01),
    ("", "MatMul"): partial(_product, _of_matrix),
    ("", "MaxPool"): _max_pool,
    ("", "Mul"): _mul,
    ("", "Pad"): _pad,
    ("", "Sigmoid"): partial(_times, 0.25),
    # The Jacobian diag(p) − ppᵀ has no eigenvalue above 1/2.
    ("", "Softmax"): partial(_times, 0.5),
}
_WITH_WEIGHT = ("Conv", "Gemm", "MatMul")


def bound_changes(model: ir.Model, own: Mapping[Site, float], shapes: Shapes) -> dict[str, Change]:
    """Return a bound on the change of every value of the main graph, or why there is none.

    Args:
        model: the pruned model, unchanged.
        own: of every pruned site the change of its node's output on the dense model's inputs, its
            moved bias included.
        shapes: of values of the main graph, as far as they are known.
    """
    if reason := _unfit(model, own):
        return {v.name or "": reason for node in model.graph for v in node.outputs}
    pruned = _Pruned(
        own,
        {site.nodes[0]: site for site in own},
        frozenset(site.initializer for site in own),
        shapes,
    )
    found: dict[str, Change] = {}
    for node in model.graph:
        change = pruned.change(node, found)
        found |= {value.name or "": change for value in node.outputs}
    shown = {value.name or "" for value in model.graph.outputs} & pruned.weights
    return found | dict.fromkeys(shown, "it is a pruned weight")


def _unfit(model: ir.Model, own: Mapping[Site, float]) -> str | None:
    """Say what rules every bound out."""
    for node in all_nodes(model):
        if node.domain == "" and node.op_type in _RANDOM:
            return f"{node.op_type} {names.node_reference(node)!r} draws random numbers"
    nodes = {names.node_reference(node) for node in model.graph}
    for site in own:
        if len(site.nodes) > 1:
            return f"several nodes multiply by {site.name!r}"
        if site.nodes[0] not in nodes:
            return f"{site.name!r} lies in a body or a function"
        if site.dtype not in ("FLOAT", "DOUBLE"):
            return f"{site.name!r} is {site.dtype}, which rounds"
    return None


@dataclass(frozen=True)
class _Pruned:
    """What the changes of a pruned model begin with: its sites by their nodes and weights."""

    own: Mapping[Site, float]
    nodes: Mapping[str, Site]
    weights: frozenset[str]
    shapes: Shapes

    def change(self, node: ir.Node, found: Mapping[str, Change]) -> Change:
        """Return the change of a node's outputs."""
        site = self.nodes.get(names.node_reference(node))
        reads = [value.name or "" for value in walk.read_values(node)]
        for name in reads:
            if isinstance(reason := found.get(name, 0.0), str):
                return reason
        try:
            self._require_weights(node, site, reads)
            if site is None and not any(found.get(name, 0.0) for name in reads):
                return 0.0
            rule = RULES.get((node.domain, node.op_type))
            if rule is None:
                raise _NoBound("there is no rule for this operator")
            changes = [0.0 if v is None else float(found.get(v.name or "", 0)) for v in node.inputs]
            return rule(_Read(node, changes, self.shapes, 0.0 if site is None else self.own[site]))
        except _NoBound as error:
            return f"{node.op_type} {names.node_reference(node)!r}: {error}"

    def _require_weights(self, node: ir.Node, site: Site | None, reads: list[str]) -> None:
        """Raise where a pruned weight is read otherwise than the rules expect."""
        others = list(reads)
        if site is not None:
            weight = optional(node, 1)
            plain = node.op_type in _WITH_WEIGHT and not integer(node, "transA", 0)
            if not plain or weight is None or weight.name != site.initializer:
                raise _NoBound(f"it multiplies by {site.name!r} in a way that has no rule")
            others.remove(site.initializer)
        if pruned := self.weights & set(others):
            raise _NoBound(f"it reads {min(pruned)!r}, a pruned weight, which changes")


def spectral_norm(matrix: NDArray[np.float64]) -> float:
    """Return the largest singular value of `(out, in)`; the Frobenius norm where that is costly."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    if not small.size or float(len(small)) ** 3 > _MOST_WORK:
        return float(np.linalg.norm(matrix))
    return math.sqrt(max(float(np.linalg.eigvalsh(small @ small.T)[-1]), 0.0))


def window_overlap(kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> int:
    """Return how many windows an element can lie in at most."""
    return math.prod(
        -(-length * math.gcd(stride, dilation) // stride)
        for length, stride, dilation in zip(kernel, strides, dilations, strict=True)
    )


def convolution_norm(
    kernel: NDArray[np.float64], strides: Sequence[int], dilations: Sequence[int]
) -> float:
    """Return a bound on the norm of a convolution, whatever its padding and its input's size.

    The smaller of two bounds. As a product with patches it has at most the norm of the matrix
    `(out, channels · positions)` times the root of the number of patches that an element lies in.
    And without stride it has at most the largest norm of `F(ω) = Σ_j W_j exp(iωj)`, `(out,
    channels)`, over all ω. `Re(u*F(ω)v)`, centred, is of exponential type `(k − 1)/2` along each
    axis, so that at a distance `δ` from its largest value it is at least `cos(Σ δ (k − 1)/2)` of it
    (Duffin and Schaeffer 1938). So with `d` axes the largest value is at most `1/cos(π/12)` times
    that on a grid of `6d(k − 1)` points an axis. A stride leaves outputs out, a dilation only
    rescales ω.

    Args:
        kernel: `(groups, out, channels, *kernel)`.
        strides, dilations: one an axis of the kernel.
    """
    groups, out, channels, *lengths = kernel.shape
    flat = kernel.reshape(groups, out, -1)
    patches = math.sqrt(window_overlap(lengths, strides, dilations)) * max(map(spectral_norm, flat))
    grid = [max(1, 6 * len(lengths) * (length - 1)) for length in lengths]
    if groups * math.prod(grid) * float(min(out, channels)) ** 3 > _MOST_WORK:
        return patches
    axes = range(3, kernel.ndim)
    spectrum = np.moveaxis(np.fft.rfftn(kernel, s=grid, axes=axes), (1, 2), (-2, -1))
    if out > channels:
        spectrum = spectrum.swapaxes(-2, -1)
    gram = spectrum @ spectrum.conj().swapaxes(-2, -1)
    largest = float(np.linalg.eigvalsh(gram)[..., -1].max())
    return min(patches, math.sqrt(max(largest, 0.0)) / math.cos(math.pi / 12))
