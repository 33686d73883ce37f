"""Which GPU is taken, how much of it, and what is said where it is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from emulation import Gpu
from onnx import TensorProto, helper

from iobs_onnx import engine
from iobs_onnx.engine import Engine
from iobs_onnx.errors import DependencyError, ModelError, OptionError
from iobs_onnx.passes import Segment, partition
from iobs_onnx.runtime import find_device, open_session, run_errors, session
from iobs_onnx.runtime.device import cuda_options

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture
def model() -> ir.Model:
    """`y = |x|`."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["y"])], "one", values[:1], values[1:]
    )
    opset = [helper.make_opsetid("", 18)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=10))


@pytest.fixture
def segment(model: ir.Model) -> Segment:
    (found,) = partition(model, outputs=["y"])
    return found


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(DependencyError, match=f"^device {name}: torch sees no CUDA device;"):
            find_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, known in ((1, "give cuda:0$"), (4, "give cuda:0 to cuda:3$")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(
            OptionError, match=f"^device cuda:4: torch sees no such GPU here; {known}"
        ):
            find_device("cuda:4")
    assert find_device("cuda:3") == torch.device("cuda", 3)
    assert find_device("auto") == find_device("cuda") == torch.device("cuda", 0)


def test_what_onnx_runtime_is_told(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    told: list[Any] = []

    class Refused:
        def __init__(self, *_: Any, providers: list[Any], **__: Any) -> None:
            told.extend(providers)
            raise RuntimeError("Available memory of 5 is smaller than requested bytes of 9")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Refused)
    with pytest.raises(DependencyError, match=r"failed on CUDA \(Available .* of 9\); put that"):
        open_session(model, "cuda", gpu=1)
    half = str(gpu.free // 2)
    assert told == [(CUDA, cuda_options(1)), CPU]
    assert told[0][1] == {
        "device_id": "1",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "gpu_mem_limit": half,
    }
    assert "gpu_mem_limit" not in cuda_options(2)  # torch sees two GPUs
    with (
        pytest.raises(ModelError, match="of 9; memory is full: make --batch-size or"),
        run_errors(),
    ):
        raise RuntimeError("Available memory of 5 is smaller than requested bytes of 9")


def test_a_segment_is_no_larger_than_a_quarter_of_the_gpu(gpu: Gpu, tmp_path: Path) -> None:
    own = Engine("cuda", 1 << 40, tmp_path, device=gpu.device)
    assert (own.budget, own.host_budget) == (gpu.free // 4, 1 << 40)
    assert own.store().device == gpu.device
    assert own.store().has_room(torch.empty(gpu.free // 4, dtype=torch.int8))
    assert not own.store().has_room(torch.empty(gpu.free // 4 + 1, dtype=torch.int8))
    # Where ONNX Runtime is on the CPU, or torch, values lie on the host.
    assert Engine("cpu", 1 << 40, tmp_path, device=gpu.device).store().device is None
    assert Engine("cuda", 1 << 40, tmp_path).store().device is None


def test_a_segment_that_falls_to_the_cpu(
    gpu: Gpu, tmp_path: Path, model: ir.Model, segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Engine("auto", 1 << 30, tmp_path, device=gpu.device)
    stream = own.stream(model, [])
    assert own.open(model, segment, ["y"], stream) is not None
    assert own.ran(segment) == CUDA

    def fails(*_: Any, **__: Any) -> None:
        raise DependencyError("provider cuda: no; or use --provider cpu")

    monkeypatch.setattr(engine, "open_session", fails)
    told = (
        "the segment of 'y' falls to the CPU, where others run on CUDA: provider cuda: no; or use "
        "--provider cpu, or a smaller --memory-budget"
    )
    with pytest.raises(DependencyError) as caught:
        own.open(model, segment, ["y"], stream)
    assert str(caught.value) == told
    # A worker on a machine without CUDA.
    with pytest.raises(DependencyError, match=rf"^the segment of 'y' ran on the {CUDA}, and elsew"):
        own.note(segment, CPU, {})


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_run_settles_on_one_provider(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: ir.Model, segment: Segment
) -> None:
    """With the GPU wheel and no GPU: once, and as if there were no CUDA, bfloat16 widened."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    assert session.settle_provider("auto") == session.settle_provider("cpu") == "cpu"
    with pytest.raises(DependencyError, match="could not load CUDA"):
        session.settle_provider("cuda")
    asked: list[str] = []

    def opened(*given: Any, **how: Any) -> Any:
        asked.append(given[1])
        return open_session(*given, **how)

    monkeypatch.setattr(engine, "open_session", opened)
    monkeypatch.setattr(engine, "widen", lambda part: ["bfloat16"])
    own = Engine("auto", 1 << 30, tmp_path)
    assert own.open(model, segment, ["y"], own.stream(model, [])) is not None
    assert (asked, own.ran(segment)) == (["cpu"], CPU)
    assert own.used()["bfloat16"] == "computed in float32"
