"""What a walk over Llama-shaped models costs on 1, 8 and 64 devices, on paper.

    python benchmarks/spread.py

Work and bytes are counted, from the shapes of the layers and from how walks and solvers go
(`iobs_onnx/pruning/`, `iobs_onnx/solvers/iobs.py`). What a unit of each kind of work takes is
measured here, on one core, or stated with `--product`, `--inverse` (TFLOP/s) and `--link` (GB/s)
for a device that is not here. Forward passes count as products. Nothing overlaps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from iobs_onnx.pruning.shard import SHARDS

# Iterations of the search and of the refit: MiniLM's layers settle at 2:4 after 33 to 48.
STEPS, REFIT = 40, 25


@dataclass(frozen=True)
class Model:
    """A Llama: `kv` is the width of keys, and of values."""

    name: str
    blocks: int
    hidden: int
    kv: int
    wide: int

    @property
    def taps(self) -> list[tuple[int, int, bool]]:
        """Inputs and outputs of the layers of a block by tap, and whether a stream is beside."""
        hidden, wide = self.hidden, self.wide
        return [
            (hidden, hidden + 2 * self.kv, False),
            (hidden, hidden, True),
            (hidden, 2 * wide, False),
            (wide, hidden, True),
        ]


MODELS = (
    Model("7 B", 32, 4096, 4096, 11008),
    Model("70 B", 80, 8192, 1024, 28672),
    Model("405 B", 126, 16384, 1024, 53248),
)


def counted(model: Model, tokens: int, workers: int) -> tuple[float, float, float]:
    """Return the seconds' worth of a walk: FLOP of products and inverses a worker, bytes moved.

    Blocks of 512 outputs are shared out; inverses are made by every worker that has some.
    """
    products = inverses = moved = 0.0
    shards = -(-SHARDS // min(workers, SHARDS)) / SHARDS  # of the feeds, in the fullest worker
    for inputs, outputs, beside in model.taps:
        weight = inputs * outputs
        summed = 1.5 * inputs**2 + (weight if beside else 0)  # half a Gram matrix, a drift
        # Dense, pruned as it was and pruned as it is: three passes over each layer.
        products += shards * 2 * tokens * (3 * weight + summed)
        parts = min(workers, -(-outputs // 512))
        share = -(-outputs // 512 // -parts) * -512 / outputs if parts > 1 else 1.0
        products += 2 * inputs * weight * share * (STEPS + REFIT)
        hold = max(2, min(8, round(1.5 * inputs / outputs)))
        inverses += inputs**3 * (2 + STEPS / hold)
        if workers > 1:
            moved += SHARDS * 4 * summed + 4 * parts * inputs**2 + 4 * weight * (2 + workers)
    return model.blocks * products, model.blocks * inverses, model.blocks * moved


def rate(flop: float, work: Callable[[], object]) -> float:
    """Return FLOP/s of the processor's time."""
    work()
    started, count = time.process_time(), 0
    while time.process_time() - started < 1.0:
        work()
        count += 1
    return count * flop / (time.process_time() - started)


def measured() -> tuple[float, float]:
    """Return FLOP/s of products and of inverses on one core."""
    torch.set_num_threads(1)
    size = 1024
    matrix = torch.randn(size, size)
    positive = matrix @ matrix.T + size * torch.eye(size)
    return (
        rate(2 * size**2 * 512, lambda: matrix @ matrix[:, :512]),
        rate(size**3, lambda: torch.cholesky_inverse(torch.linalg.cholesky(positive))),
    )


def main() -> None:
    """Count, and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=128 * 2048)
    parser.add_argument("--product", type=float, help="TFLOP/s of float32 products")
    parser.add_argument("--inverse", type=float, help="TFLOP/s of Cholesky factors and inverses")
    parser.add_argument("--link", type=float, default=10.0, help="GB/s that reach the driver")
    arguments = parser.parse_args()
    product, inverse = measured()
    print(f"one core here: products {product / 1e9:.1f} GFLOP/s, inverses {inverse / 1e9:.1f}")
    product = arguments.product * 1e12 if arguments.product else product
    inverse = arguments.inverse * 1e12 if arguments.inverse else inverse
    table = Table("model", "devices", "products", "inverses", "moved", "hours")
    for model in MODELS:
        for workers in (1, 8, 64):
            work, factors, moved = counted(model, arguments.tokens, workers)
            hours = (work / product + factors / inverse + moved / arguments.link / 1e9) / 3600
            cells = (
                f"{work / 1e15:.0f} PFLOP",
                f"{factors / 1e15:.0f} PFLOP",
                f"{moved / 1e12:.1f} TB",
            )
            table.add_row(model.name, str(workers), *cells, f"{hours:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
