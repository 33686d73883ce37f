"""If, Loop and Scan: bodies are run by plain Python loops."""

from __future__ import annotations

import torch
from torch import Tensor

from iobs_onnx.runtime.differentiable.context import Context


def if_(context: Context, condition: Tensor, *captured: Tensor) -> tuple[Tensor, ...]:
    """If: only the branch that is taken is run."""
    branch = "then_branch" if bool(condition) else "else_branch"
    return tuple(context.bodies[branch]([], captured))


def loop(context: Context, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Loop: values it carries, then those it collects step by step."""
    given, captured = inputs[: context.operands], inputs[context.operands :]
    count, condition, *carried = given
    limit = None if count is None else int(count)
    going = condition is None or bool(condition)
    body = context.bodies["body"]
    collected: list[list[Tensor]] = []
    step = 0
    while going and (limit is None or step < limit):
        again, *results = body([torch.tensor(step), torch.tensor(going), *carried], captured)  # type: ignore[list-item, arg-type]
        carried = list(results[: len(carried)])
        collected.append(results[len(carried) :])
        going = bool(again)
        step += 1
    if not collected and context.outputs > len(carried):
        raise context.error("a loop that does not run collects values of unknown shape")
    return (*carried, *(torch.stack(column) for column in zip(*collected, strict=True)))  # type: ignore[arg-type]


def scan(context: Context, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Scan: over slices of its last inputs."""
    given, captured = inputs[: context.operands], inputs[context.operands :]
    number = context.integer("num_scan_inputs", 1)
    states, scanned = list(given[:-number]), given[-number:]
    body = context.bodies["body"]
    axes = context.integers("scan_input_axes") or (0,) * number
    backwards = context.integers("scan_input_directions") or (0,) * number
    slices = [
        (x.flip(axis) if reverse else x).unbind(axis)
        for x, axis, reverse in zip(scanned, axes, backwards, strict=True)
    ]
    collected: list[list[Tensor]] = []
    for parts in zip(*slices, strict=True):
        results = body([*states, *parts], captured)
        states = results[: len(states)]
        collected.append(results[len(states) :])
    wanted = context.outputs - len(states)
    if not collected and wanted:
        raise context.error("a scan over nothing collects values of unknown shape")
    out_axes = context.integers("scan_output_axes") or (0,) * wanted
    reversed_ = context.integers("scan_output_directions") or (0,) * wanted
    columns = list(zip(*collected, strict=True)) if wanted else []
    stacked = [
        torch.stack(column[::-1] if reverse else column, axis)
        for column, axis, reverse in zip(columns, out_axes, reversed_, strict=True)
    ]
    return (*states, *stacked)
