"""How long `iobs` searches: each preset is a solver."""

from __future__ import annotations

from iobs_onnx.solvers.cbs import CBS
from iobs_onnx.solvers.iobs import IOBS
from iobs_onnx.solvers.problem import Solver

PRESETS: dict[str, Solver] = {
    "fast": IOBS(rho=2.0, saliency=0.5, inverses=1, tolerance=None),
    "balanced": IOBS(),
    # Tableaux take in³ a row: most of an hour for a layer of 4096 × 4096.
    "best": CBS(start=IOBS(restarts=24), swaps=64, widest=2048),
}
