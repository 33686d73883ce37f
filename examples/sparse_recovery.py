"""Sparse linear regression: Topk-I-OBS against k-IHT, the synthetic study of the I-OBS paper.

    python examples/sparse_recovery.py --prior gaussian --plot gaussian.png
    python examples/sparse_recovery.py --prior mnist --images t10k-images-idx3-ubyte.gz

Observed without noise is `y = X w*`, `X` `(n, d)` with entries N(0, 1/n); the loss is the mean
squared error `‖Xw − y‖² / n`, whose gradient carries the factor 2/n and whose Hessian is
`(2/n) XᵀX`. Iterates may keep k weights, more than the k* of `w*`.

=========  ======  ====  ====  ===  =====  =============================================
prior      n       d     k*    k    steps  w*
=========  ======  ====  ====  ===  =====  =============================================
gaussian   256     128   16    64   750    16 entries N(0, 1), at random
mnist      1568    784   its   2k*  4000   the pixels 0 to 255 of a digit; k* are not black
=========  ======  ====  ====  ===  =====  =============================================

`--scaling paper` repeats the published runs. They set the gradient, with its factor 2/n,
against the Hessian `XᵀX`, without it: every step is the fraction 2/n of a Newton step, and for
k-IHT, whose step is 1/λ_max(XᵀX) on the same gradient, 2/n of a step 1/L. Here that is the
learning rate 2/n. `--scaling newton` takes whole steps: the first Newton step from anywhere
lands on w*. Both algorithms start from dense points, entries uniform in ±1/√d: from 0, every
fractional Newton step would be a multiple of w*, and no support would be left to find.

Trials draw float32 in a fixed order from one generator, then compute in float64. With seed
1234 the Gaussian trials are the very ones of the published curves.

Paper: D. Wu et al., "The Iterative Optimal Brain Surgeon: Faster Sparse Recovery by Leveraging
Second-Order Information", NeurIPS 2024 (arXiv:2408.17163).
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from iobs_onnx.errors import DataError, InputError, IobsError, OptionError
from iobs_onnx.recovery import Options, Recovery, k_iht, least_squares, topk_iobs

ALGORITHMS: dict[str, Callable[..., Recovery]] = {"topk_iobs": topk_iobs, "k_iht": k_iht}
LABELS = {"topk_iobs": "Topk-I-OBS", "k_iht": "k-IHT"}
COLOURS = {"topk_iobs": "tab:blue", "k_iht": "tab:red"}
STEPS = {"gaussian": 750, "mnist": 4000}
DIGITS_SHOWN = 4
NO_IMAGES = (
    "--images: --prior mnist needs MNIST's digits; get t10k-images-idx3-ubyte.gz (or the "
    "training file) from https://ossci-datasets.s3.amazonaws.com/mnist/ and pass its path"
)


@dataclass(frozen=True)
class Trial:
    """One problem: `x` `(n, d)`, `solution` `(d,)`, both float64, and a start an algorithm."""

    x: Tensor
    solution: Tensor
    kept: int
    starts: dict[str, Tensor]


@dataclass(frozen=True)
class Result:
    """One algorithm over all trials: `(trials, steps + 1)` each; `recovered` `(trials, d)`."""

    loss: NDArray[np.float64]
    distance: NDArray[np.float64]
    recovered: NDArray[np.float64]


def gaussian_trials(trials: int, seed: int) -> Iterator[Trial]:
    """Yield problems whose 16 of 128 non-zeros are standard normal."""
    n, d, nonzeros, kept = 256, 128, 16, 64
    generator = torch.Generator().manual_seed(seed)
    for _ in range(trials):
        solution = torch.randn(d, 1, generator=generator)
        solution[torch.randperm(d, generator=generator)[: d - nonzeros]] = 0
        x = torch.randn(n, d, generator=generator) / math.sqrt(n)
        starts = _starts(d, generator)
        # The published runs had a third algorithm; its start keeps our numbers theirs.
        _start(d, generator)
        yield Trial(x.double(), solution.squeeze(1).double(), kept, starts)


def mnist_trials(trials: int, seed: int, images: NDArray[np.uint8]) -> Iterator[Trial]:
    """Yield problems whose solution is the pixels of a digit of `images`, `(count, d)`."""
    d = images.shape[1]
    n = 2 * d
    chooser = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(trials):
        digit = torch.from_numpy(images[chooser.randint(0, len(images) - 1)])
        x = torch.randn(n, d, generator=generator) / math.sqrt(n)
        kept = min(d, 2 * int(digit.count_nonzero()))
        yield Trial(x.double(), digit.double(), kept, _starts(d, generator))


def _starts(d: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {name: _start(d, generator) for name in ALGORITHMS}


def _start(d: int, generator: torch.Generator) -> Tensor:
    bound = 1 / math.sqrt(d)
    return torch.empty(d).uniform_(-bound, bound, generator=generator).double()


def read_images(path: Path | None) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of unsigned bytes, `(count, rows, columns)`, as `(count, d)`."""
    if path is None:
        raise DataError(NO_IMAGES)
    if not path.is_file():
        raise DataError(f"{path}: no such file. {NO_IMAGES}")
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}). {NO_IMAGES}") from error
    magic, count, rows, columns = np.frombuffer(content[:16].ljust(16, b"\0"), ">u4").tolist()
    # 8: unsigned bytes; 3: three axes.
    if magic != 0x0803 or not count or len(content) != 16 + count * rows * columns:
        raise DataError(f"{path}: not an IDX file of images. {NO_IMAGES}")
    return np.frombuffer(content, np.uint8, offset=16).reshape(count, rows * columns).copy()


def run(trials: Sequence[Trial] | Iterator[Trial], scaling: str, steps: int) -> dict[str, Result]:
    """Run both algorithms on each trial, `steps` steps each."""
    runs: dict[str, list[Recovery]] = {name: [] for name in ALGORITHMS}
    for trial in trials:
        objective = least_squares(trial.x, trial.x @ trial.solution)
        rate = 2 / len(trial.x) if scaling == "paper" else 1.0
        # Without a tolerance every curve has the same length.
        options = Options(learning_rate=rate, max_steps=steps, tolerance=None)
        for name, algorithm in ALGORITHMS.items():
            recovery = algorithm(
                objective, trial.starts[name], trial.kept, options=options, target=trial.solution
            )
            runs[name].append(recovery)
    return {name: _result(recoveries) for name, recoveries in runs.items()}


def _result(recoveries: list[Recovery]) -> Result:
    return Result(
        loss=np.array([recovery.trace.loss for recovery in recoveries]),
        distance=np.array([recovery.trace.distance for recovery in recoveries]),
        recovered=np.stack([recovery.weight.numpy() for recovery in recoveries]),
    )


def summary(results: dict[str, Result]) -> dict[str, dict[str, list[float]]]:
    """Return the mean loss and the mean distance to w* after 0, 1, ... steps."""
    return {
        name: {"loss": result.loss.mean(0).tolist(), "distance": result.distance.mean(0).tolist()}
        for name, result in results.items()
    }


def plot(path: Path, title: str, results: dict[str, Result], digits: NDArray[np.float64]) -> None:
    """Draw mean curves over the range of the trials; below, `digits` and what came of them."""
    from matplotlib.figure import Figure

    shown = min(DIGITS_SHOWN, len(digits))
    figure = Figure(figsize=(10, 4.5 + 4.5 * bool(shown)), layout="constrained")
    curves, *below = figure.subfigures(1 + bool(shown), 1, squeeze=False)[:, 0]
    curves.suptitle(title)
    panels = curves.subplots(1, 2)
    for axes, field, label in zip(
        panels, ("loss", "distance"), ("mean squared error", "distance to w*"), strict=True
    ):
        for name, result in results.items():
            values = getattr(result, field)
            steps = range(values.shape[1])
            axes.plot(steps, values.mean(0), color=COLOURS[name], label=LABELS[name])
            axes.fill_between(
                steps, values.min(0), values.max(0), color=COLOURS[name], alpha=0.2, lw=0
            )
        axes.set(xlabel="step", ylabel=label, yscale="log")
        axes.legend()
    for pictures in below:
        rows = {"w*": digits} | {LABELS[name]: r.recovered for name, r in results.items()}
        _draw_digits(pictures.subplots(len(rows), shown, squeeze=False), rows)
    figure.savefig(path, dpi=120)


def _draw_digits(grid: NDArray[Any], rows: dict[str, NDArray[np.float64]]) -> None:
    for line, (label, weights) in zip(grid, rows.items(), strict=True):
        for axes, weight in zip(line, weights, strict=False):
            side = math.isqrt(len(weight))
            axes.imshow(weight.reshape(-1, side), cmap="gray", vmin=0, vmax=255)
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(label)


@contextmanager
def _one_thread() -> Iterator[None]:
    """A product of this size is done before a second thread has woken up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Sparse recovery by Topk-I-OBS and k-IHT: the I-OBS paper's synthetic study."
    )
    parser.add_argument("--prior", choices=("gaussian", "mnist"), required=True)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, help="default: 750 for gaussian, 4000 for mnist")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--scaling", choices=("paper", "newton"), default="paper")
    parser.add_argument("--images", type=Path, metavar="FILE.idx.gz", help="MNIST's digits")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the mean curves here")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them here")
    arguments = parser.parse_args(argv)
    arguments.steps = STEPS[arguments.prior] if arguments.steps is None else arguments.steps
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what would only fail after the run."""
    for option in ("trials", "steps"):
        if getattr(arguments, option) < 1:
            raise OptionError(f"--{option} {getattr(arguments, option)}: must be at least 1")
    if arguments.images is not None and arguments.prior != "mnist":
        raise OptionError("--images: only --prior mnist reads images")
    for path in filter(None, (arguments.json, arguments.plot)):
        if not path.parent.is_dir():
            raise OptionError(f"{path}: the folder does not exist; make it first")


def _study(arguments: argparse.Namespace) -> None:
    _check(arguments)
    if arguments.prior == "mnist":
        images = read_images(arguments.images)
        trials = list(mnist_trials(arguments.trials, arguments.seed, images))
        digits = np.stack([trial.solution.numpy() for trial in trials])
    else:
        trials = list(gaussian_trials(arguments.trials, arguments.seed))
        digits = np.empty((0, 0))
    began = time.perf_counter()
    with _one_thread():
        results = run(trials, arguments.scaling, arguments.steps)
    seconds = time.perf_counter() - began
    curves = summary(results)

    about = f"{arguments.prior} prior, {arguments.scaling} scaling, {arguments.trials} trials"
    print(f"{about}, {arguments.steps} steps, {seconds:.1f} s")
    for name, curve in curves.items():
        print(
            f"{LABELS[name]:<12} loss {curve['loss'][-1]:.3e}  "
            f"distance to w* {curve['distance'][-1]:.3e}"
        )
    if arguments.json is not None:
        settings = {
            key: getattr(arguments, key) for key in ("prior", "scaling", "trials", "steps", "seed")
        }
        arguments.json.write_text(json.dumps(settings | {"algorithms": curves}, indent=1) + "\n")
    if arguments.plot is not None:
        plot(arguments.plot, about, results, digits)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; return 0, 2 for bad input or usage, 1 for what else went wrong."""
    arguments = _arguments(argv)
    try:
        _study(arguments)
    except IobsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
