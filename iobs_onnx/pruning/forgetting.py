"""What a round measured, kept on disk for the next one."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from iobs_onnx.hessian import Cross, Hessian, combine, mix
from iobs_onnx.passes import replacing
from iobs_onnx.runtime import Calibration


@dataclass(frozen=True)
class Recall:
    """Adds what earlier rounds measured to what this one measures.

    After round t every sum of products is `S_t = X_tᵀX_t + φ S_{t−1}`, over as many rows
    `n_t + φ n_{t−1}`, as in recursive least squares.

    Attributes:
        folder: for one file a segment and round.
        number: of this round, from 1.
        factor: φ, the forgetting factor: 0 forgets all, 1 nothing.
    """

    folder: Path
    number: int
    factor: float

    def joined(self, segment: int, measured: Calibration) -> Calibration:
        """Return `measured` with what the round before knew of this segment.

        The file of this round is written if it is not there yet. A run that goes on behind a
        solved segment measures only some of its taps again, and finds the file.
        """
        if not self.factor or not measured.hessians:
            return measured
        hessians, residuals = dict(measured.hessians), dict(measured.residuals)
        before = self._file(self.number - 1, segment)
        if before.exists():
            some = next(iter(hessians.values()))
            with safe_open(before, "pt", device=str(some.matrix.device)) as held:
                # The round before may not have run the body that a tap lies in.
                known = {tap: h for tap, h in measured.hessians.items() if _held(held, tap, "rows")}
                for tap, new in known.items():
                    old = _read(held, tap)
                    weighed = dataclasses.replace(
                        old,
                        rows=round(self.factor * old.rows),
                        weight=self.factor * old.weight,
                        shares=None if old.shares is None else self.factor * old.shares,
                    )
                    hessians[tap] = combine([new, weighed])
                for pair, cross in measured.residuals.items():
                    share = measured.hessians[pair[0]].weight / hessians[pair[0]].weight
                    earlier = _read_cross(held, pair)
                    parts = [(cross, share), *([(earlier, 1 - share)] if earlier else [])]
                    residuals[pair] = mix(*zip(*parts, strict=True))
        after = self._file(self.number, segment)
        if not after.exists():
            _write(after, hessians, residuals)
        return dataclasses.replace(measured, hessians=hessians, residuals=residuals)

    def _file(self, number: int, segment: int) -> Path:
        return self.folder / f"round-{number}-segment-{segment:04d}.hessians.safetensors"


def _write(path: Path, hessians: dict[Any, Hessian], residuals: dict[Any, Cross]) -> None:
    tensors = {}
    for tap, item in hessians.items():
        tensors[_key(tap, "rows")] = torch.tensor(item.rows)
        tensors[_key(tap, "weight")] = torch.tensor(item.weight, dtype=torch.float64)
        tensors[_key(tap, "matrix")], tensors[_key(tap, "mean")] = item.matrix, item.mean
        if item.shares is not None:
            tensors[_key(tap, "shares")] = item.shares
    crosses = {tap: item.drift for tap, item in hessians.items() if item.drift} | residuals
    for left, cross in crosses.items():
        tensors[_key(left, "cross")], tensors[_key(left, "cross mean")] = cross.matrix, cross.mean
    with replacing(path) as file:
        save_file(tensors, file)


def _read(held: Any, tap: Hashable) -> Hessian:
    matrix, mean = (held.get_tensor(_key(tap, what)) for what in ("matrix", "mean"))
    rows = int(held.get_tensor(_key(tap, "rows")))
    weight = float(held.get_tensor(_key(tap, "weight")))
    shares = held.get_tensor(_key(tap, "shares")) if _held(held, tap, "shares") else None
    return Hessian(matrix, rows, weight, mean, _read_cross(held, tap), shares)


def _read_cross(held: Any, left: Hashable) -> Cross | None:
    """Return it, or None where that round had none: the two streams were the same."""
    if not _held(held, left, "cross"):
        return None
    return Cross(held.get_tensor(_key(left, "cross")), held.get_tensor(_key(left, "cross mean")))


def _held(held: Any, left: Hashable, what: str) -> bool:
    return _key(left, what) in held.keys()  # noqa: SIM118 - not a mapping


def _key(left: Hashable, what: str) -> str:
    return f"{left!r} {what}"
