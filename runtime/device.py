"""The GPU that torch and ONNX Runtime share: which one it is, and how much of it each may take.

Written without a GPU at hand: held to an emulation (`tests/cuda/`), not run on one.
"""

from __future__ import annotations

import torch

from iobs_onnx.errors import DependencyError, OptionError

# Of all memory of a GPU: a segment's weights and Hessians, and again as much for activations
# between two. As on the host, a fixed part, so that a run that goes on cuts the same segments.
_SHARE = 4
# Of what is free when a session is opened; there are two where two models run in step.
_SESSION_SHARE = 2


def find_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:N` names; `cuda` is `cuda:0`.

    Raises:
        DependencyError: torch sees no GPU.
        OptionError: there are fewer.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DependencyError(
            f"device {name}: torch sees no CUDA device; install a CUDA build of torch or use "
            "--device cpu"
        )
    index, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        known = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise OptionError(f"device {name}: torch sees no such GPU here; give {known}")
    return torch.device("cuda", index)


def share_of(device: torch.device) -> int:
    """Return a quarter of a GPU's memory, in bytes."""
    return torch.cuda.mem_get_info(device)[1] // _SHARE


def cuda_options(index: int) -> dict[str, str]:
    """Return the options of ONNX Runtime's CUDA provider for one session on GPU `index`.

    Its arena grows by what is asked for, to at most half of what is free now; where torch cannot
    say how much that is, without a limit.
    """
    options = {
        "device_id": str(index),
        # It multiplies in TF32 on CUDA unless told otherwise: 10 bits of mantissa.
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        # The exhaustive search, its default, tries every algorithm in as much memory as it wants.
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    if torch.cuda.is_available() and index < torch.cuda.device_count():
        torch.cuda.empty_cache()  # what torch keeps, but does not use, is free
        free, _ = torch.cuda.mem_get_info(index)
        options["gpu_mem_limit"] = str(free // _SESSION_SHARE)
    return options


def wait_for(device: torch.device | None) -> None:
    """Wait until torch is done on a GPU: ONNX Runtime computes on a stream of its own.

    It must neither read what torch has yet to write, nor write what torch has yet to read. ONNX
    Runtime itself waits at the end of a run.
    """
    if device is not None:
        torch.cuda.synchronize(device)
