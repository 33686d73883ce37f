"""Cut a problem into parts that can be solved in several places."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from iobs_onnx.solvers.iobs import IOBS, blocks
from iobs_onnx.solvers.problem import Problem, Solver


def cut(problem: Problem, solver: Solver, parts: int) -> list[Problem]:
    """Return at most so many problems whose solutions, one below the other, are the whole's.

    They are so to the last bit: a part is whole blocks of outputs that the solver searches on their
    own. Where it looks at all outputs together there is one part.
    """
    rows = blocks(problem) if isinstance(solver, IOBS) else []
    parts = min(parts, len(rows))
    if parts < 2:
        return [problem]
    found = []
    for first, stop in pairwise(part * len(rows) // parts for part in range(parts + 1)):
        weight = problem.weight[rows[first].start : rows[stop - 1].stop]
        found.append(replace(problem, weight=weight, blocks=(len(weight),), of=len(problem.weight)))
    return found
