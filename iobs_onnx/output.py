"""Write a pruned model in the form that was asked for, and say how large and where it is of use."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import ModelError, OptionError
from iobs_onnx.passes import (
    deployment_warnings,
    engines_2_4,
    mask_file,
    masks_of,
    model_hash,
    model_sizes,
    require_output,
    save_model,
    store_sparsely,
    trtexec_command,
)
from iobs_onnx.runtime import Feed, available_providers, open_session
from iobs_onnx.site import Site
from iobs_onnx.sparsity import Pattern


def require_form(model: ir.Model, output: str | os.PathLike[str] | None, form: str) -> None:
    """Raise what writing would, before hours are spent on what cannot be written.

    Raises:
        OptionError: the output cannot be written, or the form needs one and there is none.
    """
    if output is not None:
        require_output(model, output)
    elif form == "mask":
        raise OptionError("emit mask: the masks lie beside the model; give an output")


def describe_file(path: Any) -> dict[str, Any]:
    """Return path, hash and sizes of a model file; all None for a model in memory."""
    if not isinstance(path, str | os.PathLike):
        return dict.fromkeys(("path", "sha256", "bytes", "zstd_bytes"))
    sizes = model_sizes(path)
    return {
        "path": os.fspath(path),
        "sha256": model_hash(path),
        "bytes": sizes.bytes,
        "zstd_bytes": sizes.zstd_bytes,
    }


def set_form(model: ir.Model, sites: Sequence[Site], config: PruneConfig) -> dict[str, Any]:
    """Give the pruned tensors the form that `emit` asks for, in place.

    Returns:
        For the report: the `form`, and which tensors stay dense and why.
    """
    left: dict[str, str] = {}
    if config.emit == "sparse-initializer":
        left = store_sparsely(model, sites)
    return {"form": config.emit, "left_dense": left}


def write(
    model: ir.Model,
    sites: Sequence[Site],
    output: str | os.PathLike[str] | None,
    config: PruneConfig,
) -> dict[str, Any]:
    """Write the model, with masks beside it where they are asked for, and measure it.

    Returns:
        For the report: path, hash and sizes; `masks`, their file; and `refused`, what ONNX Runtime
        says against a form that it may not read, None where it loads it.
    """
    masks = refused = None
    if output is not None:
        with_masks = config.emit == "mask"
        save_model(model, output, masks=masks_of(model, sites) if with_masks else None)
        masks = str(mask_file(output)) if with_masks else None
        if config.emit == "sparse-initializer":
            refused = _refused(output, config)
    return {**describe_file(output), "masks": masks, "refused": refused}


def describe_deployment(
    model: ir.Model,
    sites: Sequence[Site],
    patterns: Iterable[Pattern],
    output: str | os.PathLike[str] | None,
    feeds: Iterable[Feed],
    config: PruneConfig,
) -> dict[str, Any]:
    """Return what engines can do with the pruned weights, for the report.

    Args:
        model: the sparse model.
        sites: those pruned.
        patterns: what they hold.
        output: its file; a stand-in is named where there is none.
        feeds: whose shapes the command's dynamic axes range over.
        config: the options.
    """
    seen: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for feed in feeds:
        for name, array in feed.items():
            seen[name].append(array.shape)
    engines = [engines_2_4(site) for site in sites]
    return {
        "tensorrt": sum(tensorrt.eligible for tensorrt, _ in engines),
        "tensorrt_likely": sum(tensorrt.likely for tensorrt, _ in engines),
        "cusparselt": sum(cusparselt.eligible for _, cusparselt in engines),
        "trtexec": trtexec_command(model, output or "sparse.onnx", sites, seen),
        "warnings": deployment_warnings(sites, patterns, available_providers(), config.emit),
    }


def _refused(path: str | os.PathLike[str], config: PruneConfig) -> str | None:
    try:
        open_session(path, config.provider)
    except ModelError as error:
        return str(error)
    return None
