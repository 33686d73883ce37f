"""Run a program in chunks whose inner values are computed again for the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from iobs_onnx.runtime.differentiable.program import Program, Step, execute


def run_in_chunks(program: Program, arguments: Sequence[Tensor]) -> list[Tensor]:
    """Return the wanted values of a program; √n chunks of √n nodes.

    Raises:
        ModelError: a node cannot be evaluated.
    """
    if not torch.is_grad_enabled():
        return program.run(arguments)
    values = program.values(arguments)
    length = max(1, isqrt(len(program.steps)))
    for start in range(0, len(program.steps), length):
        chunk = program.steps[start : start + length]
        made = {place for step in chunk for place in step.outputs}
        dropped = {place for step in chunk for place in step.release}
        reads = sorted({p for step in chunk for p in step.inputs if p} - made)
        kept = sorted(made - dropped)
        found = checkpoint(
            _run, chunk, reads, kept, program.size, *(values[p] for p in reads), use_reentrant=False
        )
        for place in dropped:
            values[place] = None
        for place, value in zip(kept, found, strict=True):
            values[place] = value
    return program.wanted(values)


def _run(
    chunk: Sequence[Step],
    reads: Sequence[int],
    kept: Sequence[int],
    size: int,
    *arguments: Tensor | None,
) -> list[Tensor | None]:
    values: list[Tensor | None] = [None] * size
    for place, argument in zip(reads, arguments, strict=True):
        values[place] = argument
    execute(chunk, values)
    return [values[place] for place in kept]
