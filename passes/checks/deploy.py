"""Which 2:4 weights a deployment engine can use, which it is likely to, and how to try it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import onnx_ir as ir

from iobs_onnx.passes.ops import no_kernel_2_4
from iobs_onnx.site import Patches, Site
from iobs_onnx.sparsity import NM, Pattern

# TensorRT's dense kernels win below this many input or output channels (fp16 and int8).
_PICKED_ABOVE = 256
# cuSPARSELt takes matrices with both dimensions a multiple of this: fp16 and bf16, int8.
_CUSPARSELT = {False: 16, True: 32}
# Lengths of a dynamic axis that has no other bound: of the first axis, of any other.
_GUESSES = ((1, 8, 32), (1, 128, 512))


@dataclass(frozen=True)
class Engine:
    """What one engine can do with a 2:4 weight.

    Attributes:
        name: `TensorRT` or `cuSPARSELt`.
        eligible: whether its sparse kernels take the weight.
        likely: whether they are likely to be chosen over dense ones; for cuSPARSELt, which the
            caller chooses, the same as `eligible`.
        rule: what decided.
    """

    name: str
    eligible: bool
    likely: bool
    rule: str


def engines_2_4(site: Site) -> tuple[Engine, Engine]:
    """Return what TensorRT and cuSPARSELt can do with a 2:4 pattern of this weight.

    Groups of four lie along the reduction axis for each output: consecutive inputs of a matrix,
    consecutive input channels at each kernel position of a convolution.
    """
    return _tensorrt(site), _cusparselt(site)


def eligibility_2_4(site: Site) -> tuple[bool, str]:
    """Say whether TensorRT can use a 2:4 pattern of this weight, with the rules that decide."""
    tensorrt, cusparselt = engines_2_4(site)
    if not tensorrt.eligible or cusparselt.eligible:
        return tensorrt.eligible, tensorrt.rule
    return True, f"{tensorrt.rule}; cuSPARSELt: {cusparselt.rule}"


def _tensorrt(site: Site) -> Engine:
    inputs, outputs = site.run, site.out_features * site.groups
    is_conv = isinstance(site.taps[0].form, Patches)
    along = f"{inputs} {'input channels at each kernel position' if is_conv else 'inputs'}"
    likely = site.groups == 1 and min(inputs, outputs) > _PICKED_ABOVE
    if reason := _no_kernel(site):
        rule = reason
    elif inputs % 4:
        rule = f"{along} (axis {site.axis}) are not a multiple of 4"
    else:
        if site.groups > 1:
            hint = "grouped convolutions and batched products are seldom picked"
        elif likely:
            hint = f"likely picked in fp16 or int8: {inputs} in and {outputs} out exceed 256"
        else:
            hint = f"seldom picked: {inputs} in and {outputs} out do not both exceed 256"
        return Engine(
            "TensorRT", True, likely, f"{along} (axis {site.axis}) are a multiple of 4; {hint}"
        )
    return Engine("TensorRT", False, False, rule)


def _cusparselt(site: Site) -> Engine:
    form = site.taps[0].form
    inputs, outputs = site.in_features, site.out_features
    multiple = _CUSPARSELT[site.quantized is not None]
    eligible = False
    if reason := _no_kernel(site):
        rule = reason
    elif isinstance(form, Patches) and max(form.kernel) > 1:
        rule = "multiplies matrices: a convolution beyond 1 x 1 has to be unfolded first"
    elif inputs % multiple or outputs % multiple:
        rule = f"wants multiples of {multiple}, not {inputs} in and {outputs} out"
    else:
        eligible, rule = True, f"{inputs} in and {outputs} out are multiples of {multiple}"
    return Engine("cuSPARSELt", eligible, eligible, rule)


def _no_kernel(site: Site) -> str:
    for op_type in site.op_type.split(", "):
        if reason := no_kernel_2_4(op_type):
            return reason
    if site.dtype == "DOUBLE":
        return "no sparse kernel multiplies float64"
    if site.quantized is not None and (site.dtype != "INT8" or any(site.quantized.zero_point)):
        return f"sparse kernels of integers take INT8 with zero point 0, not {_grid(site)}"
    return ""


def _grid(site: Site) -> str:
    assert site.quantized is not None
    zeros = sorted(set(site.quantized.zero_point))
    return f"{site.dtype} with zero point {', '.join(map(str, zeros[:3]))}"


def is_2_4(pattern: Pattern) -> bool:
    """Whether every weight that holds a pattern also holds 2:4."""
    if not isinstance(pattern, NM):
        return False
    return (pattern.m == 4 and pattern.n <= 2) or (pattern.m == 2 and pattern.n == 1)


def trtexec_command(
    model: ir.Model,
    file: str | os.PathLike[str],
    sites: Iterable[Site],
    seen: Mapping[str, Sequence[tuple[int, ...]]] | None = None,
) -> str:
    """Return a command that builds and times a TensorRT engine which may use sparse weights.

    Each dynamic axis ranges over the lengths that were seen, its most common in the middle; where
    none was seen, over a guess (1, 8, 32 for the first axis, 1, 128, 512 for others).

    Args:
        model: as written to `file`.
        file: its path.
        sites: those pruned; their types decide the precision.
        seen: shapes of feeds by the name of the input.
    """
    arguments = [f"--onnx={os.fspath(file)}", f"--saveEngine={Path(file).with_suffix('.engine')}"]
    arguments.append("--sparsity=enable")
    sites = tuple(sites)
    kinds = {site.dtype for site in sites if site.quantized is None}
    arguments.append("--bf16" if "BFLOAT16" in kinds else "--fp16")
    if any(site.quantized is not None for site in sites):
        arguments.append("--int8")
    ranges = {
        value.name or "": _ranges(value, (seen or {}).get(value.name or "", ()))
        for value in model.graph.inputs
        if not value.is_initializer() and _is_dynamic(value)
    }
    if ranges:
        for index, name in enumerate(("min", "opt", "max")):
            shapes = (f"{i}:{'x'.join(str(axis[index]) for axis in r)}" for i, r in ranges.items())
            arguments.append(f"--{name}Shapes={','.join(shapes)}")
    return shlex.join(["trtexec", *arguments])


def _is_dynamic(value: ir.Value) -> bool:
    return value.shape is not None and not all(_is_static(length) for length in value.shape)


def _is_static(length: object) -> TypeGuard[int]:
    """Whether it is a number; Paddle2ONNX writes -1 for a dynamic axis."""
    return isinstance(length, int) and length >= 0


def _ranges(value: ir.Value, seen: Sequence[tuple[int, ...]]) -> list[tuple[int, int, int]]:
    """Return the least, the usual and the largest length of every axis."""
    assert value.shape is not None
    ranges = []
    for axis, length in enumerate(value.shape):
        if _is_static(length):
            ranges.append((length, length, length))
        elif lengths := [shape[axis] for shape in seen]:
            usual = max(sorted(set(lengths)), key=lengths.count)
            ranges.append((1 if axis == 0 else min(lengths), usual, max(lengths)))
        else:
            ranges.append(_GUESSES[min(axis, 1)])
    return ranges


def deployment_warnings(
    sites: Sequence[Site],
    patterns: Iterable[Pattern],
    providers: Iterable[str],
    form: str = "dense",
) -> list[str]:
    """Return, one line each, why no runtime in reach makes the sparse model faster.

    Args:
        sites: those pruned.
        patterns: what they hold.
        providers: execution providers that the installed ONNX Runtime has.
        form: of the written weights (`--emit`).
    """
    lines = []
    others = {str(pattern): None for pattern in patterns if not is_2_4(pattern)}
    engines = [_tensorrt(site) for site in sites]
    if others:
        lines.append(
            f"{', '.join(others)}: no engine has kernels for this pattern; what it saves is the "
            "size of the compressed file. Hardware wants 2:4"
        )
    elif not any(engine.eligible for engine in engines):
        lines.append("no pruned weight is eligible for 2:4 kernels: see the rule of each")
    elif not any(engine.likely for engine in engines):
        lines.append(
            "TensorRT will likely keep its dense kernels: no pruned weight has more than 256 "
            "inputs and outputs"
        )
    if "TensorrtExecutionProvider" in providers:
        if not others:
            lines.append("ONNX Runtime's TensorRT provider uses 2:4 with trt_sparsity_enable=1")
    else:
        lines.append(
            "no runtime installed here uses the sparsity: ONNX Runtime's CPU and CUDA kernels "
            "multiply by zeros; speed comes from 2:4 on NVIDIA GPUs since Ampere, through "
            "TensorRT or cuSPARSELt"
        )
    if form == "sparse-initializer":
        lines.append("TensorRT's parser wants dense tensors: write the model with --emit dense")
    return lines
