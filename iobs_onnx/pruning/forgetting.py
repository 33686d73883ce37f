"""What a round measured, kept on disk for the next one."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from iobs_onnx.hessian import Cross, Hessian, combine, mix
from iobs_onnx.pruning.checkpoint import Checkpoint
from iobs_onnx.runtime import Calibration


@dataclass(frozen=True)
class Recall:
    """Adds what earlier rounds measured to what this one measures.

    After round t every sum of products is `S_t = X_tᵀX_t + φ S_{t−1}`, over as many rows
    `n_t + φ n_{t−1}`, as in recursive least squares.

    Attributes:
        checkpoint: takes one record a segment and round.
        number: of this round, from 1.
        factor: φ, the forgetting factor: 0 forgets all, 1 nothing.
    """

    checkpoint: Checkpoint
    number: int
    factor: float

    def holds(self, segment: int) -> bool:
        """Whether this round's sums of a segment need not be measured for the next round."""
        return not self.factor or self._get(self.number, segment) is not None

    def joined(self, segment: int, measured: Calibration, *, whole: bool) -> Calibration:
        """Return `measured` with what the round before knew of this segment.

        Args:
            segment: its index.
            measured: of this round.
            whole: whether all taps of the segment were measured; what is returned is then kept for
                the next round.
        """
        if not self.factor or not measured.hessians:
            return measured
        hessians, residuals = dict(measured.hessians), dict(measured.residuals)
        before = self._get(self.number - 1, segment)
        if before is not None:
            # The round before may not have run the body that a tap lies in.
            known = {tap: h for tap, h in measured.hessians.items() if before.knows(tap)}
            for tap, new in known.items():
                old = before.hessian(tap, new.matrix.device)
                weighed = dataclasses.replace(
                    old,
                    drift=None if tap in measured.out_of_step else old.drift,
                    rows=round(self.factor * old.rows),
                    weight=self.factor * old.weight,
                    shares=None if old.shares is None else self.factor * old.shares,
                )
                hessians[tap] = combine([new, weighed])
            for pair, cross in measured.residuals.items():
                share = measured.hessians[pair[0]].weight / hessians[pair[0]].weight
                earlier = before.cross(pair, cross.matrix.device)
                parts = [(cross, share), *([(earlier, 1 - share)] if earlier else [])]
                residuals[pair] = mix(*zip(*parts, strict=True))
        if whole:
            tensors, facts = _as_tensors(hessians, residuals)
            name = _name(self.number, segment)
            self.checkpoint.put_tensors(name, tensors, facts, aside=True)
        return dataclasses.replace(measured, hessians=hessians, residuals=residuals)

    def _get(self, number: int, segment: int) -> _Held | None:
        held = self.checkpoint.get_tensors(_name(number, segment), aside=True)
        return None if held is None else _Held(*held)


@dataclass(frozen=True)
class _Held:
    """The sums of a segment, as they lie on disk."""

    tensors: Mapping[str, ir.ExternalTensor]
    facts: Mapping[str, Any]

    def knows(self, tap: Hashable) -> bool:
        return repr(tap) in self.facts

    def hessian(self, tap: Hashable, device: torch.device) -> Hessian:
        rows, weight = self.facts[repr(tap)]
        matrix, mean = (self._tensor(tap, what, device) for what in ("matrix", "mean"))
        known = _key(tap, "shares") in self.tensors
        shares = self._tensor(tap, "shares", device) if known else None
        return Hessian(matrix, rows, weight, mean, self.cross(tap, device), shares)

    def cross(self, left: Hashable, device: torch.device) -> Cross | None:
        """Return it, or None where that round had none: the two streams were the same."""
        if _key(left, "cross") not in self.tensors:
            return None
        return Cross(*(self._tensor(left, what, device) for what in ("cross", "cross mean")))

    def _tensor(self, left: Hashable, what: str, device: torch.device) -> torch.Tensor:
        return torch.tensor(self.tensors[_key(left, what)].numpy(), device=device)


def _as_tensors(
    hessians: Mapping[Any, Hessian], residuals: Mapping[Any, Cross]
) -> tuple[dict[str, Any], dict[str, Any]]:
    tensors = {}
    for tap, item in hessians.items():
        tensors[_key(tap, "matrix")], tensors[_key(tap, "mean")] = item.matrix, item.mean
        if item.shares is not None:
            tensors[_key(tap, "shares")] = item.shares
    crosses = {tap: item.drift for tap, item in hessians.items() if item.drift} | dict(residuals)
    for left, cross in crosses.items():
        tensors[_key(left, "cross")], tensors[_key(left, "cross mean")] = cross.matrix, cross.mean
    facts = {repr(tap): [item.rows, item.weight] for tap, item in hessians.items()}
    return {key: tensor.cpu().numpy() for key, tensor in tensors.items()}, facts


def _name(number: int, segment: int) -> str:
    return f"round-{number}-segment-{segment:04d}-sums"


def _key(left: Hashable, what: str) -> str:
    return f"{left!r} {what}"
