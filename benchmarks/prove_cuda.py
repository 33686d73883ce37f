"""Prove the CUDA path on a GPU in ten minutes: one line of JSON a check.

    python benchmarks/prove_cuda.py                               # torch and ONNX Runtime on CUDA
    python benchmarks/prove_cuda.py --provider cpu --device cuda  # no GPU build of ONNX Runtime
    python benchmarks/prove_cuda.py --provider cpu --device cpu --quick --checks gram solvers

Each line holds the `check`, whether it is `ok` (null where it cannot run here, with the reason as
`skipped`), its `seconds`, `peak_bytes` of the device's memory, and what it measured. `--quick`
makes all sizes small: the script then tries itself, on a CPU too. Exit code 1 if a check is not ok.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import scale
import torch
from onnx import TensorProto, helper

import iobs_onnx
from iobs_onnx import engine
from iobs_onnx.engine import memory_faults
from iobs_onnx.errors import IobsError
from iobs_onnx.hessian import exact_float32
from iobs_onnx.layer import absolute_damping
from iobs_onnx.runtime import Store, available_providers, find_device, open_session, run_errors
from iobs_onnx.runtime.device import cuda_options
from iobs_onnx.runtime.sums import GramAccumulator
from iobs_onnx.solvers import SOLVERS, Problem, make_solver
from iobs_onnx.sparsity import parse_sparsity

ROOT = Path(__file__).resolve().parents[1]
Facts = dict[str, Any]


class Skipped(Exception):
    """A check cannot run here."""


@dataclass(frozen=True)
class Here:
    """What the checks run on.

    Attributes:
        provider: of ONNX Runtime, `cpu` or `cuda`.
        device: of torch, `cpu`, `cuda` or `cuda:N`.
        quick: whether sizes are small.
        models: files to prune, by what they are.
        folder: for files.
    """

    provider: str
    device: str
    quick: bool
    models: dict[str, Path]
    folder: Path

    @property
    def gpu(self) -> int:
        """The number of the GPU."""
        return int(self.device.partition(":")[2] or 0)

    def pick(self, small: int, large: int) -> int:
        """Return one of two sizes."""
        return small if self.quick else large


def versions(here: Here) -> Facts:
    """What is installed."""
    packages = ("torch", "onnx", "onnx_ir", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    facts = {**found, "python": platform.python_version(), "providers": available_providers()}
    if here.device != "cpu":
        major, minor = torch.cuda.get_device_capability()
        facts |= {"gpu": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
    return {"ok": True, **facts}


def dlpack(here: Here) -> Facts:
    """Outputs on the device become tensors there, which outlive the next run and the session.

    In float32, float16 and bfloat16.
    """
    from torch.utils.dlpack import from_dlpack

    if here.provider != "cuda":
        raise Skipped("needs ONNX Runtime on CUDA")
    facts: Facts = {}
    for name in ("FLOAT", "FLOAT16", "BFLOAT16"):
        kind = getattr(TensorProto, name)
        value = [helper.make_tensor_value_info(n, kind, [4, 8]) for n in "xy"]
        node = helper.make_node("Add", ["x", "x"], ["y"])
        graph = helper.make_graph([node], "double", value[:1], value[1:])
        session = open_session(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
            "cuda",
            gpu=here.gpu,
        )
        made = []
        for factor in (1.0, 3.0):
            dtype = helper.tensor_dtype_to_np_dtype(kind)
            binding = session.io_binding()
            binding.bind_cpu_input("x", np.full((4, 8), factor, dtype))
            binding.bind_output("y", "cuda", here.gpu)
            session.run_with_iobinding(binding)
            made.append(from_dlpack(binding.get_outputs()[0]))
        del session, binding
        held = [(t.device.type, float(t.float().mean())) for t in made]
        facts[name.lower()] = held == [("cuda", 2.0), ("cuda", 6.0)]
    return {"ok": all(facts.values()), **facts}


def gram(here: Here) -> Facts:
    """A sum of 65,536 products against float64: within 1e-5 of its norm, as docs promise."""
    rows, inputs = here.pick(4096, 65_536), here.pick(128, 1024)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    sums = GramAccumulator(inputs, device=here.device)
    with exact_float32():
        sums.add(x.to(here.device))
    found = sums.finish().matrix[0].double().cpu()
    exact = torch.zeros(inputs, inputs, dtype=torch.float64)
    for part in x.split(4096):
        exact += part.double().T @ part.double()
    exact /= rows
    error = float((found - exact).norm() / exact.norm())
    worst = float((found - exact).abs().max() / exact.abs().max())
    return {"ok": error <= 1e-5 and worst <= 1e-5, "error": error, "worst": worst}


def solvers(here: Here) -> Facts:
    """Every solver on the device against the CPU: its error, and how much of the mask agrees."""
    outputs, inputs = here.pick(32, 256), here.pick(64, 512)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * inputs, inputs, generator=generator)
    x = x @ torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    weight, hessian = torch.randn(outputs, inputs, generator=generator), x.T @ x / len(x)
    facts: Facts = {}
    for name in SOLVERS:
        if name in ("obs", "lobs", "cbs", "ebd") and not here.quick:
            continue  # minutes at this size
        for pattern in ("2:4", "0.5"):
            found = []
            for device in ("cpu", here.device):
                problem = Problem(
                    weight.to(device),
                    hessian.to(device),
                    absolute_damping(0.01, hessian),
                    parse_sparsity(pattern),
                    (outputs,),
                )
                with exact_float32():
                    solved = make_solver(name).solve(problem)
                delta = solved.weight.cpu() - weight
                found.append((float(((delta @ hessian) * delta).sum()), solved.mask.cpu()))
            (before, one), (after, other) = found
            agree = float((one == other).float().mean())
            facts[f"{name} {pattern}"] = [round(after / before, 5), round(agree, 4)]
    worst = max(abs(ratio - 1) for ratio, _ in facts.values())
    return {"ok": worst <= 0.01, "error_ratio_and_mask_agreement": facts}


def _mixes(here: Here) -> Iterator[tuple[str, str]]:
    for provider in dict.fromkeys(("cpu", here.provider)):
        for device in dict.fromkeys(("cpu", here.device)):
            yield provider, device


def _pruned(here: Here, kind: str) -> Facts:
    """Prune a model with every mix of provider and device; layer errors agree within 1 %."""
    if kind not in here.models:
        raise Skipped(f"no file of {kind}: give --{kind}")
    facts, errors = {}, []
    for provider, device in _mixes(here):
        began = time.perf_counter()
        report = iobs_onnx.prune(
            here.models[kind],
            sparsity="2:4",
            calibration="random",
            samples=here.pick(8, 64),
            preset="fast",
            provider=provider,
            device=device,
        ).report
        errors.append(report.totals["layer_error_geomean"])
        facts[f"{provider} {device}"] = {
            "seconds": round(time.perf_counter() - began, 2),
            "layer_error": errors[-1],
            "runtime": {k: v for k, v in report.runtime.items() if k != "segments"},
        }
    return {"ok": max(errors) / min(errors) <= 1.01, **facts}


def encoder(here: Here) -> Facts:
    """all-MiniLM-L6-v2 with every mix of provider and device."""
    return _pruned(here, "encoder")


def convolutional(here: Here) -> Facts:
    """ResNet-20 with every mix of provider and device."""
    return _pruned(here, "convolutional")


def llama_block(here: Here) -> Facts:
    """One block of the shape of Llama-2-7B, 2:4: seconds a stage. 32 of them are to take 300 s."""
    sizes = (64, 176, 4, 256, 16) if here.quick else (4096, 11_008, 32, 512, 2048)
    names = ("HIDDEN", "FEED_FORWARD", "HEADS", "VOCABULARY", "SEQUENCE")
    for name, size in zip(names, sizes, strict=True):
        setattr(scale, name, size)
    path = here.folder / "block.onnx"
    scale.write_model(path, 1)
    random = np.random.default_rng(0)
    feeds = [
        {"input_ids": random.integers(0, scale.VOCABULARY, (1, scale.SEQUENCE))}
        for _ in range(here.pick(2, 16))
    ]
    report = iobs_onnx.prune(
        path,
        sparsity="2:4",
        calibration=feeds,
        preset="fast",
        provider=here.provider,
        device=here.device,
    ).report
    facts = {
        "feeds": len(feeds),
        "stages": report.seconds,
        "sites": report.totals["sites"],
        "segment_providers": report.runtime["segment_providers"],
    }
    if here.provider == "cuda":
        facts["nodes_by_provider"] = _placed(path, feeds[0], here)
    return {"ok": report.totals["sites"] == 7, **facts}


def tiers(here: Here) -> Facts:
    """Activations on the device, on the host and on disk: the same bytes; seconds of each."""
    path = here.folder / "tiers.onnx"
    _shape(here)
    scale.write_model(path, 2)
    random = np.random.default_rng(0)
    feeds = [
        {"input_ids": random.integers(0, scale.VOCABULARY, (1, scale.SEQUENCE))} for _ in range(16)
    ]
    facts: Facts = {}
    written = set()
    for name, room, host in (("device", None, None), ("host", 0, None), ("disk", 0, 0)):
        output = here.folder / name / "sparse.onnx"
        output.parent.mkdir()
        began = time.perf_counter()
        with patch.object(engine, "Store", partial(_store, room, host)):
            iobs_onnx.prune(
                path,
                sparsity="2:4",
                calibration=feeds,
                preset="fast",
                provider=here.provider,
                device=here.device,
                output=output,
            )
        facts[f"{name}_seconds"] = round(time.perf_counter() - began, 2)
        written.add(b"".join(each.read_bytes() for each in sorted(output.parent.glob("*.data"))))
    return {"ok": len(written) == 1 and written != {b""}, **facts}


def _store(
    room: int | None,
    host: int | None,
    folder: Path,
    budget: int,
    device: torch.device | None = None,
    share: int = 0,
) -> Store:
    """Return a store with other budgets, where they are given."""
    return Store(folder, budget if host is None else host, device, share if room is None else room)


def _shape(here: Here) -> None:
    """Make models of `benchmarks/scale.py` small."""
    sizes = (64, 176, 4, 256, 16) if here.quick else (512, 1408, 8, 512, 128)
    names = ("HIDDEN", "FEED_FORWARD", "HEADS", "VOCABULARY", "SEQUENCE")
    for name, size in zip(names, sizes, strict=True):
        setattr(scale, name, size)


def _placed(path: Path, feed: dict[str, Any], here: Here) -> dict[str, int]:
    """Count the nodes of a model that each provider runs, by ONNX Runtime's profile."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(here.folder / "profile")
    providers = [("CUDAExecutionProvider", cuda_options(here.gpu)), "CPUExecutionProvider"]
    session = ort.InferenceSession(str(path), options, providers=providers)
    session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    counts: dict[str, int] = {}
    for event in events:
        if event.get("cat") == "Node" and "provider" in event.get("args", {}):
            name = event["args"]["provider"]
            counts[name] = counts.get(name, 0) + 1
    return counts


def wide_solve(here: Here) -> Facts:
    """A solve with as many inputs as the down projection of a 70 B model."""
    outputs, inputs = here.pick(16, 1024), here.pick(256, 28_672)
    generator = torch.Generator(here.device).manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator, device=here.device)
    hessian = torch.zeros(inputs, inputs, device=here.device)
    for _ in range(here.pick(1, 16)):
        x = torch.randn(here.pick(512, 4096), inputs, generator=generator, device=here.device)
        hessian.addmm_(x.T, x)
    problem = Problem(
        weight, hessian, absolute_damping(0.01, hessian), parse_sparsity("2:4"), (outputs,)
    )
    began = time.perf_counter()
    with exact_float32():
        solved = make_solver("iobs", "fast").solve(problem)
        seconds = time.perf_counter() - began
        magnitude = make_solver("magnitude").solve(problem)
    lost = []
    for each in (solved, magnitude):
        delta = each.weight - weight
        lost.append(float(((delta @ hessian) * delta).double().sum()))
    ratio = lost[0] / lost[1]
    return {"ok": ratio < 1, "solve_seconds": round(seconds, 3), "error_over_magnitude": ratio}


def distillation(here: Here) -> Facts:
    """Distil a model of one block; training runs on the CPU, whatever the device."""
    path = here.folder / "small.onnx"
    _shape(here)
    scale.write_model(path, 1)
    random = np.random.default_rng(0)
    feeds = [
        {"input_ids": random.integers(0, scale.VOCABULARY, (1, scale.SEQUENCE))} for _ in range(32)
    ]
    told = iobs_onnx.prune(
        path,
        sparsity="2:4",
        calibration=feeds,
        preset="fast",
        provider=here.provider,
        device=here.device,
        distill="model",
        distill_steps=here.pick(10, 50),
    ).report.distillation
    assert told is not None
    return {"ok": told["after"] <= told["before"], "before": told["before"], "after": told["after"]}


def out_of_memory(here: Here) -> Facts:
    """Memory that is full is one line that says so, and the next run has it back.

    Of torch, and of ONNX Runtime where it is on CUDA.
    """
    if here.device == "cpu":
        raise Skipped("needs a CUDA device")
    device = find_device(here.device)
    free, _ = torch.cuda.mem_get_info(device)
    said = [_fault(lambda: torch.empty(2 * free, dtype=torch.uint8, device=device))]
    ok = said[0].startswith("device cuda: out of memory")
    if here.provider == "cuda":
        session = open_session(_filled(2 * free // 4), "cuda", gpu=here.gpu)
        said.append(_fault(lambda: session.run(None, {"x": np.ones(1, np.float32)})))
        ok &= "memory is full" in said[1]
        del session
    again = torch.ones(1024, device=device).sum().item()
    return {"ok": ok and again == 1024, "said": said}


def _fault(act: Callable[[], Any]) -> str:
    """Return what is said where memory is full."""
    try:
        with memory_faults("device cuda", "use --device cpu"), run_errors():
            act()
    except IobsError as error:
        return str(error)
    return ""


def _filled(size: int) -> onnx.ModelProto:
    """Return a model that fills so many numbers with `x`, and adds them up."""
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    shape = helper.make_tensor("shape", TensorProto.INT64, [1], [size])
    nodes = [
        helper.make_node("Expand", ["x", "shape"], ["wide"]),
        helper.make_node("ReduceSum", ["wide"], ["y"], keepdims=1),
    ]
    graph = helper.make_graph(nodes, "fill", value[:1], value[1:], [shape])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


CHECKS: dict[str, Callable[[Here], Facts]] = {
    check.__name__: check
    for check in (
        *(versions, dlpack, gram, solvers, encoder, convolutional, llama_block, tiers, wide_solve),
        *(distillation, out_of_memory),
    )
}


@contextmanager
def _peak(device: str, facts: Facts) -> Iterator[None]:
    began = time.perf_counter()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield
    if device != "cpu":
        torch.cuda.synchronize()
        facts["peak_bytes"] = torch.cuda.max_memory_allocated()
    facts["seconds"] = round(time.perf_counter() - began, 2)


def run(name: str, here: Here) -> Facts:
    """Run one check and return its line."""
    line: Facts = {"check": name, "ok": False, "seconds": 0.0, "peak_bytes": None}
    try:
        with _peak(here.device, line):
            try:
                line |= CHECKS[name](here)
            except Skipped as reason:
                line |= {"ok": None, "skipped": str(reason)}
            except (IobsError, RuntimeError, AssertionError, onnx.checker.ValidationError) as error:
                traceback.print_exc()
                line["error"] = f"{type(error).__name__}: {error}"
    except RuntimeError as error:  # of an earlier kernel, told when the device is waited for
        line["error"] = f"{type(error).__name__}: {error}"
    return line


def main(argv: list[str] | None = None) -> int:
    """Run the checks that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--device", default="cuda", help="cpu, cuda or cuda:N")
    parser.add_argument("--checks", nargs="+", default=list(CHECKS), choices=CHECKS)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--encoder", type=Path, default=ROOT / "build/models/all-MiniLM-L6-v2.onnx")
    parser.add_argument(
        "--convolutional", type=Path, default=ROOT.parent / "shared/models/resnet20.onnx"
    )
    options = parser.parse_args(argv)
    try:
        device = find_device(options.device)
    except IobsError as error:
        parser.error(f"{error}; --device cpu tries the script itself")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    files = {"encoder": options.encoder, "convolutional": options.convolutional}
    with tempfile.TemporaryDirectory(prefix="prove-cuda-") as folder:
        here = Here(
            options.provider,
            options.device,
            options.quick,
            {name: path for name, path in files.items() if path.exists()},
            Path(folder),
        )
        failed = False
        for name in options.checks:
            line = run(name, here)
            failed |= line["ok"] is False
            print(json.dumps(line), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
