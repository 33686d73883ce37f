"""What stays on the GPU and what crosses the bus, by emulation: no GPU has run any of it."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from emulation import Gpu, Mixed, emulated
from ml_dtypes import bfloat16
from onnx import TensorProto, helper

import iobs_onnx
from iobs_onnx import engine
from iobs_onnx.passes import instrument
from iobs_onnx.runtime import Store, Stream

logger = logging.getLogger(__name__)
FEEDS = 5


def pruned(model: Path, output: Path, **options: Any) -> iobs_onnx.PruneReport:
    random = np.random.default_rng(0)
    feeds = [{"input_ids": random.integers(0, 256, (1, 16))} for _ in range(FEEDS)]
    return iobs_onnx.prune(
        model,
        sparsity="2:4",
        calibration=feeds,
        holdout=feeds[:1],
        preset="fast",
        random_tokens=0.0,
        output=output,
        **options,
    ).report


def test_two_blocks_stay_on_the_gpu(llama: Path, tmp_path: Path) -> None:
    """Before there was a device tier 35 of these 112 outputs were bound, 285 copies went up."""
    with emulated(Gpu(index=1)) as gpu:
        report = pruned(llama, tmp_path / "1.onnx", device="cuda:1", provider="cuda")
    logger.info("%s %s", dict(gpu.counts), dict(gpu.traffic))
    assert report.runtime["device"] == "cuda:1"
    found = report.runtime["segment_providers"]
    assert found == ["CUDAExecutionProvider"] * 7 + [None]  # nothing is solved behind the last one
    counts = gpu.counts
    # Only the two models' outputs that are compared come down from a run.
    assert (counts["outputs"], counts["outputs"] - counts["bound"]) == (112, 2)
    assert counts["inputs"] == counts["read"]
    sites = report.totals["sites"]
    # One copy up a feed, and one that judges; weights: to be solved, and as they are written.
    assert counts["up"] == FEEDS + 1 + 2 * sites
    assert counts["down"] == 2 + sites
    # A run waits for torch, torch for nothing but whether a batch was finite.
    batches = FEEDS * len(found)
    assert counts["waits"] <= counts["runs"] + batches + 20 * sites


def test_the_tier_changes_no_byte(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device, partly on the host, all on the host, and on disk."""
    written, down = set(), []
    for room, host in ((1 << 30, 1 << 30), (20_000, 1 << 30), (0, 1 << 30), (0, 0)):
        monkeypatch.setattr(engine, "Store", partial(stored, room=room, host=host))
        folder = tmp_path / f"{room}-{host}"
        folder.mkdir()
        with emulated(Gpu()) as gpu:
            pruned(llama, folder / "o.onnx", device="cuda", provider="cuda")
        written.add((folder / "o.onnx").read_bytes() + (folder / "o.onnx.data").read_bytes())
        down.append(gpu.counts["down"])
    assert len(written) == 1
    assert down[0] < down[1] < down[2] == down[3]


def stored(folder: Path, _: int, device: Any = None, __: int = 0, *, room: int, host: int) -> Store:
    return Store(folder, host, device, room)


def test_layers_err_as_on_the_cpu(llama: Path, tmp_path: Path) -> None:
    """Sums are added in other strips, of the same float32 products."""
    here = pruned(llama, tmp_path / "cpu.onnx", device="cpu", provider="cpu")
    with emulated(Gpu()):
        there = pruned(llama, tmp_path / "cuda.onnx", device="cuda", provider="cuda")
    key = "layer_error_geomean"
    assert there.totals[key] == pytest.approx(here.totals[key], rel=1e-4)


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_mix_runs(llama: Path, tmp_path: Path, provider: str, device: str) -> None:
    with emulated(Gpu()) as gpu:
        report = pruned(llama, tmp_path / "o.onnx", device=device, provider=provider)
    assert report.runtime["device"] == ("cuda:0" if device == "cuda" else "cpu")
    assert (gpu.counts["bound"] > 0) == (provider == device == "cuda")
    if device == "cpu":
        assert gpu.counts["waits"] == 0


def test_a_value_goes_up_once_for_both_models(tmp_path: Path, gpu: Gpu) -> None:
    """Where there is no room on the device: for the dense and the pruned model together."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3]) for n in "xmy"]
    nodes = [helper.make_node("Abs", ["x"], ["a"]), helper.make_node("Add", ["a", "m"], ["y"])]
    graph = helper.make_graph(nodes, "small", values[:2], values[2:])
    opset = [helper.make_opsetid("", 18)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=10))
    feeds = [{n: np.full((2, 3), i, np.float32) for n in "xm"} for i in range(3)]
    for room in (0, 1 << 20):
        gpu.counts.clear()
        ours = Stream(iter(feeds), Store(tmp_path, 0, gpu.device, room))
        theirs = ours.over()
        session = engine.open_session(instrument(model, ["a"], {}), "cuda")
        for _ in ours.run(session, keep=["a"], alive=["a", "m"]):
            pass
        # `x` goes up, `a` comes down and `m` stays where there is no room; else `m` goes up, too.
        assert (gpu.counts["up"], gpu.counts["down"]) == ((3, 3) if room == 0 else (6, 0))
        gpu.counts.clear()
        session = engine.open_session(instrument(model, ["y"], ours.kinds(["a", "m"])), "cuda")
        runs = (s.run(session, fetch=["y", "m"], device=gpu.device) for s in (ours, theirs))
        for dense, sparse in zip(*runs, strict=True):
            for batch in (dense, sparse):
                assert batch.values["y"].device == batch.values["m"].device == gpu.device
                assert bool((batch.values["y"] == 2 * batch.values["m"]).all())
        assert gpu.counts["up"] == (6 if room == 0 else 0)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [0, 1 << 20])
@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_values_of_every_type_come_back(tmp_path: Path, gpu: Gpu, room: int, budget: int) -> None:
    store = Store(tmp_path, budget, gpu.device, room)
    kinds = (torch.bool, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
    for kind in kinds:
        given = torch.arange(6).reshape(2, 3).to(kind)
        held = store.put(given.to(gpu.device))
        found = store.get(held)
        if isinstance(found, torch.Tensor):
            assert room
            found = found.cpu()
        else:
            assert (found.dtype == bfloat16) == (kind == torch.bfloat16)
            found = torch.from_numpy(
                found.view(np.int16 if found.dtype == bfloat16 else found.dtype)
            )
            found = found.view(kind)
        assert torch.equal(found, given)
        store.drop(held)
    assert list(tmp_path.iterdir()) == []


def test_the_emulation_refuses_to_mix(gpu: Gpu) -> None:
    x = torch.ones(3, device=gpu.device)
    assert x.device == gpu.device
    with pytest.raises(Mixed):
        x + torch.ones(3)
    assert float((x * 2.0).sum()) == 6
    assert gpu.counts == {"waits": 1}
