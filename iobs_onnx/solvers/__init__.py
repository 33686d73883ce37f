"""Layer solvers: tensors in, tensors out; no ONNX, no input or output."""

from iobs_onnx.errors import OptionError
from iobs_onnx.solvers.alps import ALPS
from iobs_onnx.solvers.cbs import CBS
from iobs_onnx.solvers.ebd import EBD
from iobs_onnx.solvers.iobs import IOBS
from iobs_onnx.solvers.lobs import LOBS
from iobs_onnx.solvers.magnitude import Magnitude
from iobs_onnx.solvers.obd import OBD
from iobs_onnx.solvers.obs import OBS
from iobs_onnx.solvers.presets import PRESETS
from iobs_onnx.solvers.problem import Problem, Solver, Sparse
from iobs_onnx.solvers.sparsegpt import SparseGPT
from iobs_onnx.solvers.wanda import Wanda

SOLVERS: dict[str, type[Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "obd": OBD,
    "ebd": EBD,
    "obs": OBS,
    "lobs": LOBS,
    "cbs": CBS,
    "sparsegpt": SparseGPT,
    "alps": ALPS,
    "iobs": IOBS,
}


def make_solver(solver: str | Solver, preset: str | None = None) -> Solver:
    """Return the solver of that name with its defaults, or the instance itself.

    Args:
        solver: a name in :data:`iobs_onnx.solvers.SOLVERS`, or an instance.
        preset: `fast`, `balanced` or `best`, for `"iobs"` only.

    Raises:
        OptionError: no solver, or no preset, has that name.
    """
    if not isinstance(solver, str):
        return solver
    if solver not in SOLVERS:
        raise OptionError(f"solver {solver!r} is unknown: choose from {', '.join(SOLVERS)}")
    if preset is None:
        return SOLVERS[solver]()
    if solver != "iobs" or preset not in PRESETS:
        raise OptionError(f"preset {preset!r} of {solver}: iobs has {', '.join(PRESETS)}")
    return PRESETS[preset]


__all__ = [
    "ALPS",
    "CBS",
    "EBD",
    "IOBS",
    "LOBS",
    "OBD",
    "OBS",
    "PRESETS",
    "SOLVERS",
    "Magnitude",
    "Problem",
    "Solver",
    "Sparse",
    "SparseGPT",
    "Wanda",
    "make_solver",
]
