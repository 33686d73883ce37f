"""How fast a sparse model is against its dense one, where it runs here."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from iobs_onnx.errors import DataError, DependencyError, OptionError
from iobs_onnx.passes import (
    check_pattern,
    engines_2_4,
    find_sites,
    find_token_input,
    load_model,
    stored_slots,
)
from iobs_onnx.runtime import Feed, RandomSamples, input_specs, open_data
from iobs_onnx.runtime.bench import (
    ENGINES,
    Engine,
    Timing,
    open_engine,
    present_engines,
    time_models,
)
from iobs_onnx.runtime.semi_structured import LayerTiming, semi_structured_available, time_layer
from iobs_onnx.sparsity import NM

DEFAULT_ROUNDS = 20
_FEEDS = 8
# What a server would batch, beside the single request.
_BATCHES = (1, 16)
_LAYER_ROWS = 4096
_NOTES = {
    "cpu": "cpu: no kernel of ONNX Runtime uses the zeros, so no difference is to be expected",
    "cuda": "cuda: no kernel of ONNX Runtime uses the zeros, so no difference is to be expected",
    "tensorrt": "tensorrt: fp16, and TensorRT may pick 2:4 kernels (trt_sparsity_enable=1)",
}


@dataclass(frozen=True)
class Bench:
    """What :func:`bench` measured.

    Attributes:
        timings: of the whole models, for each engine and batch size.
        layers: of single products with cuSPARSELt, one for each shape; empty without CUDA.
        notes: what to expect and why, a line each; also the engines that are not here.
    """

    timings: list[Timing]
    layers: list[LayerTiming]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return dataclasses.asdict(self)


def bench(
    dense: str | os.PathLike[str],
    sparse: str | os.PathLike[str],
    *,
    data: Any = None,
    engines: Iterable[Engine] = (),
    batch_size: int | None = None,
    rounds: int = DEFAULT_ROUNDS,
) -> Bench:
    """Time a dense and a sparse model in turns.

    Args:
        dense, sparse: the files.
        data: feeds, in any form that :func:`iobs_onnx.prune` takes; at most eight are run.
            Without, random ones that fit the inputs are made, of 1 row and of 16.
        engines: those to use; by default all that are present.
        batch_size: rows of a feed.
        rounds: how often both run all feeds.

    Raises:
        InputError: a model, the data or an option is at fault, or an engine asked for is missing.
    """
    if rounds < 1:
        raise OptionError(f"rounds {rounds}: must be at least 1")
    asked = list(dict.fromkeys(engines))
    if unknown := [name for name in asked if name not in ENGINES]:
        raise OptionError(f"engine {unknown[0]!r} is unknown: choose from {', '.join(ENGINES)}")
    model, pruned = load_model(dense), load_model(sparse)
    workloads = _workloads(model, data, batch_size)
    notes, timings = [], []
    for engine in asked or present_engines():
        try:
            pair = [open_engine(path, engine) for path in (dense, sparse)]
        except DependencyError as error:
            if asked:
                raise
            notes.append(f"{engine} left out: {error}")
            continue
        timings += [time_models(pair[0], pair[1], feeds, engine, rounds) for feeds in workloads]
        notes.append(_NOTES[engine])
    missing = [engine for engine in ENGINES if engine not in present_engines()]
    if missing and not asked:
        notes.append(f"not in the installed ONNX Runtime: {', '.join(missing)}")
    layers = []
    if semi_structured_available():
        layers = [time_layer(w, _LAYER_ROWS, rounds) for w in _matrices(pruned)]
    else:
        notes.append("cuSPARSELt was not timed: torch sees no CUDA device of capability 8.0")
    return Bench(timings, layers, notes)


def _workloads(model: ir.Model, data: Any, batch_size: int | None) -> list[list[Feed]]:
    """Return lists of feeds, each to be timed on its own."""
    specs = input_specs(model)
    source = RandomSamples(specs, find_token_input(model)) if data is None else data
    fixed = any(spec.shape and spec.shape[0] is not None for spec in specs if not spec.optional)
    sizes: Sequence[int | None] = (batch_size,)
    if data is None and batch_size is None and not fixed:
        sizes = _BATCHES
    workloads = []
    for size in sizes:
        opened = open_data(source, specs, batch_size=size, holdout=0)
        feeds = list(itertools.islice(opened.calibration, _FEEDS))
        if not feeds:
            raise DataError("data: there are no feeds in it")
        workloads.append([{k: np.ascontiguousarray(v) for k, v in f.items()} for f in feeds])
    return workloads


def _matrices(model: ir.Model) -> list[torch.Tensor]:
    """Return one weight `(out, in)` of each shape that cuSPARSELt takes and that holds 2:4."""
    sites = [site for site in find_sites(model).sites if engines_2_4(site)[1].eligible]
    claims = {site.name: NM(2, 4) for site in sites}
    broken = {item.site for item in check_pattern(model, sites, claims)}
    stored = stored_slots(model)
    found: dict[tuple[int, int], torch.Tensor] = {}
    for site in sites:
        shape = (site.out_features, site.in_features)
        if site.name not in broken and shape not in found:
            matrices = site.to_matrices(stored[site.initializer].tensor.numpy())
            found[shape] = torch.from_numpy(matrices[0])
    return list(found.values())
