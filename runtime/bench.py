"""Time a dense and a sparse model against each other, on each engine that ONNX Runtime has here."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from iobs_onnx.errors import DependencyError
from iobs_onnx.runtime.data.feeds import Feed
from iobs_onnx.runtime.session import available_providers, run_errors

if TYPE_CHECKING:
    import onnxruntime as ort

Engine: TypeAlias = Literal["cpu", "cuda", "tensorrt"]
Run: TypeAlias = Callable[[], None]

_TENSORRT = ("TensorrtExecutionProvider", {"trt_fp16_enable": "1", "trt_sparsity_enable": "1"})
_PROVIDERS: dict[str, list[Any]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    "tensorrt": [_TENSORRT, "CUDAExecutionProvider", "CPUExecutionProvider"],
}
ENGINES: tuple[Engine, ...] = ("cpu", "cuda", "tensorrt")
_WARM_UP = 2


@dataclass(frozen=True)
class Timing:
    """Two models on the same feeds.

    Attributes:
        engine: `cpu`, `cuda` or `tensorrt` (fp16, sparse kernels allowed).
        batch: rows of a feed; None where feeds differ.
        rounds: in each, both models ran all feeds, one after the other.
        dense_ms, sparse_ms: median milliseconds a feed.
        speedup: median of `dense / sparse` over the rounds.
        speedup_range: its 10th and 90th percentile.
        dense_per_second, sparse_per_second: rows of feeds, at the medians.
    """

    engine: Engine
    batch: int | None
    rounds: int
    dense_ms: float
    sparse_ms: float
    speedup: float
    speedup_range: tuple[float, float]
    dense_per_second: float
    sparse_per_second: float


def present_engines() -> list[Engine]:
    """Return the engines whose providers the installed ONNX Runtime was built with.

    Raises:
        DependencyError: no onnxruntime is installed.
    """
    available = available_providers()
    return [engine for engine in ENGINES if _name(engine) in available]


def open_engine(model: str | os.PathLike[str], engine: Engine) -> ort.InferenceSession:
    """Load a model into one engine, which really runs it.

    Raises:
        DependencyError: the engine is not there, or its libraries do not load.
        ModelError: ONNX Runtime refuses the model.
    """
    if engine not in present_engines():
        raise DependencyError(
            f"engine {engine}: the installed onnxruntime has no {_name(engine)}; "
            "see onnxruntime.ai for builds that have it"
        )
    import onnxruntime  # noqa: PLC0415  # an extra

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    with run_errors():
        session = onnxruntime.InferenceSession(
            os.fspath(model), options, providers=_PROVIDERS[engine], enable_fallback=0
        )
    if _name(engine) not in session.get_providers():
        raise DependencyError(
            f"engine {engine}: its libraries could not be loaded (ONNX Runtime's log says which); "
            "install them or leave the engine out"
        )
    return session


def bound_runs(session: ort.InferenceSession, feeds: Sequence[Feed], engine: Engine) -> list[Run]:
    """Return a function for each feed that runs it; inputs and outputs stay on the device."""
    import onnxruntime  # noqa: PLC0415  # an extra

    device = "cpu" if engine == "cpu" else "cuda"
    runs = []
    for feed in feeds:
        binding = session.io_binding()
        for name, array in feed.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)
            binding.bind_ortvalue_input(name, value)
        for output in session.get_outputs():
            binding.bind_output(output.name, device)
        runs.append(_bound(session, binding))
    return runs


def interleave(
    dense: Sequence[Run], sparse: Sequence[Run], rounds: int, clock: Callable[[], float]
) -> list[tuple[float, float]]:
    """Time both in turns, so that a busy machine slows both; the first changes each round.

    Returns:
        Seconds of all feeds of each round, dense and sparse.
    """

    def timed(runs: Sequence[Run]) -> float:
        started = clock()
        for run in runs:
            run()
        return clock() - started

    times = []
    for number in range(-_WARM_UP, rounds):
        if number % 2:
            after, before = timed(sparse), timed(dense)
        else:
            before, after = timed(dense), timed(sparse)
        if number >= 0:
            times.append((before, after))
    return times


def time_models(
    dense: ort.InferenceSession,
    sparse: ort.InferenceSession,
    feeds: Sequence[Feed],
    engine: Engine,
    rounds: int,
) -> Timing:
    """Time two sessions on the same feeds.

    Raises:
        ModelError: a model cannot run a feed.
    """
    with run_errors():
        before = bound_runs(dense, feeds, engine)
        after = bound_runs(sparse, feeds, engine)
        times = interleave(before, after, rounds, time.perf_counter)
    sizes = [_rows(feed) for feed in feeds]
    ratios = sorted(dense_time / sparse_time for dense_time, sparse_time in times)
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    dense_ms, sparse_ms = (1000 * seconds / len(feeds) for seconds in medians)
    dense_rate, sparse_rate = (sum(sizes) / seconds for seconds in medians)
    return Timing(
        engine,
        sizes[0] if len(set(sizes)) == 1 else None,
        rounds,
        dense_ms,
        sparse_ms,
        statistics.median(ratios),
        (ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]),
        dense_rate,
        sparse_rate,
    )


def _bound(session: ort.InferenceSession, binding: ort.IOBinding) -> Run:
    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def _rows(feed: Feed) -> int:
    return max((array.shape[0] for array in feed.values() if array.ndim), default=1)


def _name(engine: str) -> str:
    provider = _PROVIDERS[engine][0]
    return provider if isinstance(provider, str) else provider[0]
