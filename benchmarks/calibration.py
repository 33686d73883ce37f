"""What calibration costs next to plain inference over the same feeds.

    python benchmarks/calibration.py --model MODEL.onnx --calibration DATA

Both sides run in one process, alternating, with the same ONNX Runtime options and feeds in
memory: the dense model's own outputs on one side; all activations that its prunable weights read,
with all their Hessians, on the other. The goal is a ratio of at most 2.2. For a transformer block
the arithmetic alone, `n·K²` for a Hessian against `2·n·K·N` for a product, asks for about 1.8.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from iobs_onnx.hessian import Hessian
from iobs_onnx.passes import find_sites, instrument
from iobs_onnx.runtime import Store, Stream, calibrate, find_padding
from iobs_onnx.runtime.data.feeds import Feed
from iobs_onnx.runtime.data.open import PAD_MASK, open_data
from iobs_onnx.runtime.session import input_specs, open_session
from iobs_onnx.site import Rows, Tap

if TYPE_CHECKING:
    import onnxruntime as ort

GOAL = 2.2


def main() -> None:
    """Measure and print."""
    arguments = _arguments()
    model = ir.load(arguments.model)
    taps = list({tap: None for site in find_sites(model).sites for tap in site.taps})
    plain = open_session(arguments.model, arguments.provider)
    values = list(dict.fromkeys(tap.value for tap in taps))
    tapped = open_session(instrument(model, values), arguments.provider)
    data = open_data(
        arguments.calibration,
        input_specs(model),
        samples=arguments.samples,
        batch_size=arguments.batch_size,
    )
    feeds = list(data.calibration)
    print(f"{len(taps)} taps, {data.samples} samples, {len(feeds)} batches; {_padding(feeds)}")

    padding = find_padding(model)

    def inference() -> None:
        for feed in feeds:
            plain.run(None, feed)

    def with_hessians(mask_padding: bool) -> dict[Tap, Hessian]:
        stream = Stream(feeds, Store(Path(), 0), padding=padding if mask_padding else None)
        batches = stream.run(tapped, fetch=values, device=arguments.device)
        return calibrate(taps, batches, device=arguments.device).hessians

    cases: dict[str, Callable[[], object]] = {
        "plain inference": inference,
        "calibration": lambda: with_hessians(True),
        "calibration, padding included": lambda: with_hessians(False),
    }
    seconds = _interleaved(cases, arguments.repeats)
    for name, times in seconds.items():
        paired = [a / b for a, b in zip(times, seconds["plain inference"], strict=True)]
        print(
            f"{name:30s} median {statistics.median(times):7.3f} s, best {min(times):7.3f} s, "
            f"ratio {statistics.median(paired):.2f}"
        )
    print(f"goal: a ratio of at most {GOAL}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak resident memory {peak:.2f} GiB, of which the feeds {_gib(feeds):.2f}")
    if arguments.reference:
        error = _error(tapped, taps, feeds, with_hessians(False))
        print(f"largest relative error of a Hessian against float64: {error:.1e}")


def _interleaved(cases: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats + 1):
        for name, case in cases.items():
            begin = time.perf_counter()
            case()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def _error(
    session: ort.InferenceSession, taps: list[Tap], feeds: list[Feed], found: dict[Tap, Hessian]
) -> float:
    """Compare with NumPy float64 sums of the same activations, for taps read along an axis."""
    plain = [tap for tap in taps if isinstance(tap.form, Rows)]
    sums = {tap: np.zeros((tap.features, tap.features)) for tap in plain}
    for feed in feeds:
        for tap in plain:
            (value,) = session.run([tap.value], feed)
            rows = np.moveaxis(value, tap.form.axis, -1).reshape(-1, tap.features)
            sums[tap] += rows.T.astype(np.float64) @ rows.astype(np.float64)
    errors = [
        np.linalg.norm(found[tap].matrix[0].cpu().numpy() - total / found[tap].rows)
        / np.linalg.norm(total / found[tap].rows)
        for tap, total in sums.items()
    ]
    return float(max(errors, default=0.0))


def _padding(feeds: list[Feed]) -> str:
    masks = [feed[PAD_MASK] for feed in feeds if PAD_MASK in feed]
    if not masks:
        return "no padding"
    real = sum(int((mask != 0).sum()) for mask in masks)
    total = sum(mask.size for mask in masks)
    return f"{total} positions, {1 - real / total:.0%} of them padding"


def _gib(feeds: list[Feed]) -> float:
    return sum(array.nbytes for feed in feeds for array in feed.values()) / 2**30


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="ONNX file")
    parser.add_argument("--calibration", required=True, help="as for iobs-onnx prune")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--reference", action="store_true", help="compare the Hessians with float64: slow"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
