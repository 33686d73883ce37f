"""SparseGPT: one sweep over the inputs with error compensation.

Frantar, Alistarh: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
ICML 2023, algorithm 1. Differences from the published code:

1. Dead inputs are not forced to zero: under damping they are pruned by magnitude.
2. With N:M the block of columns is a multiple of M, so any M works.
3. The unstructured budget of a block of columns is rounded so that the blocks' budgets sum to
   exactly the pattern's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from iobs_onnx.solvers.problem import Problem, Sparse
from iobs_onnx.sparsity import NM, top_mask


@dataclass(frozen=True)
class SparseGPT:
    """Sweep the inputs in order; each removed weight's error is compensated by later inputs.

    Attributes:
        block: columns updated at once; the mask is chosen when the sweep reaches them.
    """

    block: int = 128

    def solve(self, problem: Problem) -> Sparse:
        """Return weights whose removed entries were compensated by the inputs after them.

        With `U` the upper Cholesky factor of `(H + λI)⁻¹`, removing weight `w_j` costs
        `(w_j / U_jj)²` and moves the later weights by `−(w_j / U_jj) U_j,j:`.
        """
        upper = torch.linalg.cholesky(problem.inverse, upper=True)
        # Inputs first in memory: a step of the sweep touches one contiguous row.
        weight = problem.weight.T.contiguous()
        mask = torch.empty_like(weight, dtype=torch.bool)
        inputs = len(weight)
        step = self.block
        if isinstance(problem.pattern, NM):
            step = problem.pattern.m * max(1, self.block // problem.pattern.m)
        for start in range(0, inputs, step):
            stop = min(start + step, inputs)
            errors = _sweep_block(problem, weight, mask, upper, start, stop)
            weight[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1.0)
        return Sparse(weight.T.contiguous(), mask.T.contiguous())


def _sweep_block(
    problem: Problem,
    weight: torch.Tensor,
    mask: torch.Tensor,
    upper: torch.Tensor,
    start: int,
    stop: int,
) -> torch.Tensor:
    """Prune rows `start:stop` of the transposed weight in place; return their scaled errors."""
    block, kept, factor = weight[start:stop], mask[start:stop], upper[start:stop, start:stop]
    pivots = factor.diagonal()
    errors = torch.empty_like(block)
    group = problem.pattern.m if isinstance(problem.pattern, NM) else len(block)
    for j in range(len(block)):
        if j % group == 0:
            scores = (block[j : j + group] / pivots[j : j + group, None]).square().T
            if isinstance(problem.pattern, NM):
                kept[j : j + group] = problem.pattern.project(scores).T
            else:
                kept[:] = _unstructured_mask(problem, scores, start, stop).T
        errors[j] = block[j].masked_fill(kept[j], 0.0) / pivots[j]
        block[j].masked_fill_(~kept[j], 0.0)
        block[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1.0)
    return errors


def _unstructured_mask(
    problem: Problem, scores: torch.Tensor, start: int, stop: int
) -> torch.Tensor:
    """Mask of columns `start:stop`: each site spends its budget evenly over its columns."""
    assert not isinstance(problem.pattern, NM)
    keep, inputs = problem.pattern.keep, problem.weight.shape[1]
    parts = []
    for part in scores.split(problem.blocks):
        total = keep(len(part) * inputs)
        parts.append(top_mask(part, total * stop // inputs - total * start // inputs))
    return torch.cat(parts)
