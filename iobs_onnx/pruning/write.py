"""Write a pruned model in the form that was asked for, and say how large and where it is of use."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import CheckError, ModelError, OptionError
from iobs_onnx.passes import (
    Place,
    bring_into_memory,
    check_model,
    deployment_warnings,
    engines_2_4,
    foreign_operators,
    is_2_4,
    load_model,
    mask_file,
    masks_of,
    model_hash,
    model_sizes,
    outputs_out_of_reach,
    place_of,
    require_output,
    saving,
    store_sparsely,
    trtexec_command,
)
from iobs_onnx.pruning.records import Run, with_sites
from iobs_onnx.pruning.rounding import store_quantized
from iobs_onnx.pruning.stages import Pruned
from iobs_onnx.runtime import Feed, available_providers, open_session
from iobs_onnx.site import Site
from iobs_onnx.sparsity import Pattern


def require_form(
    model: ir.Model, source: Any, output: str | os.PathLike[str] | None, form: str
) -> Place:
    """Return where the model goes; raise what writing would, before hours are spent.

    Args:
        model: what is written.
        source: the model as it was given.
        output: as it was given.
        form: `emit`.

    Raises:
        OptionError: the output cannot be written, or the form needs one and there is none.
    """
    place = place_of(output, source)
    if place.file is not None:
        require_output(model, place.file)
    elif form == "mask":
        raise OptionError("emit mask: the masks go beside the model; give an output")
    return place


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


@dataclass(frozen=True)
class Written:
    """A pruned model in its place.

    Attributes:
        model: the sparse model, in the form that was asked for.
        output, deployment: of `report.json`.
        checker: what onnx.checker says.
    """

    model: ir.Model
    output: dict[str, Any]
    deployment: dict[str, Any]
    checker: str


def write_pruned(
    run: Run,
    pruned: Pruned,
    source: Any,
    place: Place,
) -> Written:
    """Put solved sites into the model, in the form that was asked for, and write it.

    Args:
        run: names the form.
        pruned: the sites that are sparse, and what else changed.
        source: the model as it was given.
        place: of its file; without one the model stays in memory, and is only checked.

    Raises:
        CheckError: what would be written does not hold what it promises.
    """
    config = run.config
    solved = pruned.sites
    sparse = with_sites(run.dense, solved, pruned.tensors)
    if place.file is None:
        bring_into_memory(sparse)
    left = store_sparsely(sparse, list(solved)) if config.emit == "sparse-initializer" else {}
    held = [run.patterns[site] for site in solved]
    sites = store_quantized(sparse, {site: item.codes for site, item in solved.items()}, held)
    written, checker = _write(sparse, source, sites, place, config, run.engine.folder)
    return Written(
        sparse,
        {**written, "form": config.emit, "left_dense": left},
        _describe_deployment(sparse, sites, held, place.file, run.data.held_out, config),
        checker,
    )


def _write(
    model: ir.Model,
    dense: Any,
    sites: Sequence[Site],
    place: Place,
    config: PruneConfig,
    spare: Path,
) -> tuple[dict[str, Any], str]:
    """Check the model as it is written, put it in its place, with masks if asked, and measure it.

    Args:
        model: the sparse one.
        dense: what it was made from.
        sites: pruned.
        place: of its file; without one the model is only checked.
        config: names the form.
        spare: a folder for a model that is only checked.

    Returns:
        For the report: path, hash and sizes; `masks`, their file; `beside`, the names of files
        that were copied into its folder; and `refused`, what ONNX Runtime
        says against a form that it may not read, None where it loads it. Then what onnx.checker
        says: if it complains, then of the dense model too, which pruning neither made nor mends.

    Raises:
        CheckError: onnx.checker refuses only the sparse model.
    """
    masks = masks_of(model, sites) if config.emit == "mask" else None
    output, beside = place.file, place.beside
    target = spare / "model.onnx" if output is None else output
    with saving(model, target, masks=masks, beside=beside) as file:
        checker = _checked(file, dense)
    written = {**describe_file(output), "masks": None, "refused": None}
    written["beside"] = [other.name for other in beside]
    if output is not None and masks is not None:
        written["masks"] = str(mask_file(output))
    if output is not None and config.emit == "sparse-initializer":
        written["refused"] = _refused(output, config)
    return written, checker


def _checked(file: Path, dense: Any) -> str:
    try:
        check_model(file)
    except CheckError:
        try:
            check_model(load_model(dense))
        except CheckError as error:
            return str(error)
        raise
    return "passed"


def _describe_deployment(
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
    patterns, foreign = list(patterns), foreign_operators(model)
    held = [site for site, pattern in zip(sites, patterns, strict=True) if is_2_4(pattern)]
    engines = [engines_2_4(site) for site in held]
    parsed = [] if foreign else [tensorrt for tensorrt, _ in engines]
    takes = sum(tensorrt.eligible for tensorrt in parsed)
    command = trtexec_command(model, output or "sparse.onnx", sites, seen) if takes else None
    return {
        "tensorrt": takes,
        "tensorrt_likely": sum(tensorrt.likely for tensorrt in parsed),
        "cusparselt": sum(cusparselt.eligible for _, cusparselt in engines),
        "trtexec": command,
        "warnings": [
            *deployment_warnings(sites, patterns, available_providers(), config.emit, foreign),
            *(
                f"output {name!r} was not compared: ONNX Runtime does not know {operator}"
                for name, operator in outputs_out_of_reach(model).items()
            ),
        ],
    }


def _refused(path: str | os.PathLike[str], config: PruneConfig) -> str | None:
    try:
        open_session(path, config.provider, gpu=config.gpu)
    except ModelError as error:
        return str(error)
    return None
