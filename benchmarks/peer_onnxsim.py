"""A whole model to 2:4: our command against onnxsim's SparseGPT and Wanda, on one file and data.

    python benchmarks/peer_onnxsim.py [--layers LAYERS] [--patterns 2:4] [--json FILE]

onnxsim comes from its package (extra `bench`). Every written file is judged by one script: the
layer error of each site under Hessians captured from the dense model. Seconds are wall time of
the call, calibration included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import layers as storage
import numpy as np
import onnx
import torch
from solvers import geomean

from iobs_onnx.passes import find_sites, load_model, stored_slots

ROOT = Path(__file__).resolve().parents[1]


def judge(sparse: Path, layers: list[storage.Layer]) -> tuple[float, float]:
    """Return the geometric mean of layer errors and the fraction of zeros of a file."""
    model = load_model(sparse)
    stored = stored_slots(model)
    weights = {
        site.name: torch.from_numpy(site.to_matrices(stored[site.initializer].tensor.numpy())[0])
        for site in find_sites(model).sites
    }
    errors, zeros, total = [], 0, 0
    for layer in layers:
        for name, dense in zip(layer.names, layer.weights, strict=True):
            delta = weights[name] - dense
            lost = float(((delta @ layer.hessian) * delta).sum())
            errors.append(lost / float(((dense @ layer.hessian) * dense).sum()))
            zeros += int((weights[name] == 0).sum())
            total += dense.numel()
    return geomean(errors), zeros / total


def ours(model: Path, feeds: Path, solver: str, output: Path) -> float:
    """Run the command line as a user would; return seconds."""
    count = len(list(feeds.glob("*.npz")))
    command = [sys.executable, "-m", "iobs_onnx", "prune", str(model)]
    command += ["--calibration", str(feeds), "--samples", str(count), "--sparsity", "2:4"]
    command += ["--solver", solver, "--output", str(output), "--quiet"]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def theirs(model: Path, feeds: Path, method: str, output: Path) -> float:
    """Run onnxsim on the same feeds; return seconds."""
    import onnxsim

    ready = [dict(np.load(file)) for file in sorted(feeds.glob("*.npz"))]
    call = {"sparsegpt": onnxsim.apply_sparsegpt_pruning, "wanda": onnxsim.apply_wanda_pruning}
    started = time.perf_counter()
    pruned = call[method](str(model), calibration_data=ready, n=2, m=4)
    onnx.save(pruned, output)
    return time.perf_counter() - started


def main() -> None:
    """Run all, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip", nargs="*", default=[], help="runs to leave out")
    arguments = parser.parse_args()
    model, feeds = storage.minilm()
    if not storage.DEFAULT_LAYERS.exists():
        storage.capture(model, str(feeds), storage.DEFAULT_LAYERS)
    layers = storage.read(storage.DEFAULT_LAYERS)
    folder = ROOT / "build" / "peers"
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for label, run, method in (
        ("iobs-onnx iobs", ours, "iobs"),
        ("iobs-onnx sparsegpt", ours, "sparsegpt"),
        ("onnxsim wanda", theirs, "wanda"),
        ("onnxsim sparsegpt", theirs, "sparsegpt"),
    ):
        if label in arguments.skip:
            continue
        output = folder / f"{label.replace(' ', '-')}.onnx"
        seconds = run(model, feeds, method, output)
        error, zeros = judge(output, layers)
        results[label] = {"seconds": seconds, "layer_error": error, "zeros": zeros}
        print(
            f"{label:20} {seconds:8.1f} s  layer error {error:.5f}  zeros {zeros:.2%}", flush=True
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
