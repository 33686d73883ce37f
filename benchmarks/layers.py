"""Real layers on disk: weights and Hessians of every site of a model, for the solver benchmark.

    python benchmarks/layers.py MODEL --calibration DATA --output layers.safetensors

Without MODEL it captures the default model, all-MiniLM-L6-v2, on 512 docstrings.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from iobs_onnx.hessian import combine
from iobs_onnx.passes import find_sites, instrument, load_model, stored_slots
from iobs_onnx.runtime import Store, Stream, calibrate, input_specs, open_data, open_session
from iobs_onnx.runtime.padding import find_padding

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_LAYERS = ROOT / "build" / "layers" / "all-MiniLM-L6-v2.safetensors"


@dataclass(frozen=True)
class Layer:
    """Weights `(out_i, in)` that read one activation, its Hessian `(in, in)` and mean `(in,)`."""

    names: list[str]
    weights: list[torch.Tensor]
    hessian: torch.Tensor
    mean: torch.Tensor

    @property
    def centred(self) -> torch.Tensor:
        """`H − μμᵀ`: what is left of an error whose mean a bias takes over."""
        return self.hessian - torch.outer(self.mean, self.mean)


def minilm() -> tuple[Path, Path]:
    """Return the default model and its calibration feeds, made if need be."""
    sys.path.insert(0, str(ROOT / "examples"))
    import minilm as example

    model = example.export(ROOT / "build" / "models" / "all-MiniLM-L6-v2.onnx")
    feeds = example.feeds(example.docstrings(512))
    return model, example.save_feeds(ROOT / "build" / "layers" / "feeds", feeds)


def capture(model: Path, calibration: str, output: Path) -> None:
    """Calibrate a model and write every site's weight and Hessian."""
    dense = load_model(model)
    sites = find_sites(dense).sites
    taps = list(dict.fromkeys(tap for site in sites for tap in site.taps))
    values = list(dict.fromkeys(tap.value for tap in taps))
    session = open_session(instrument(dense, values))
    data = open_data(calibration, input_specs(dense), holdout=0)
    stream = Stream(data.calibration, Store(output.parent, 0), padding=find_padding(dense))
    hessians = calibrate(taps, stream.run(session, fetch=values)).hessians
    tensors: dict[str, torch.Tensor] = {}
    index: list[dict[str, object]] = []
    stored = stored_slots(dense)
    for number, together in enumerate(dict.fromkeys(site.taps for site in sites)):
        members = [site for site in sites if site.taps == together]
        whole = combine([hessians[tap] for tap in together])
        for group, (matrix, mean) in enumerate(zip(whole.matrix, whole.mean, strict=True)):
            key = f"{number}.{group}"
            tensors[f"hessian {key}"] = matrix.contiguous()
            tensors[f"mean {key}"] = mean.contiguous()
            for site in members:
                weights = site.to_matrices(stored[site.initializer].tensor.numpy())
                tensors[f"weight {key} {site.name}"] = torch.from_numpy(weights[group].copy())
            index.append({"key": key, "names": [site.name for site in members]})
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output, metadata={"index": json.dumps(index)})


def read(path: Path) -> list[Layer]:
    """Return the layers that :func:`capture` wrote."""
    with safe_open(path, "pt") as file:
        index = json.loads(file.metadata()["index"])
        return [
            Layer(
                item["names"],
                [file.get_tensor(f"weight {item['key']} {name}") for name in item["names"]],
                file.get_tensor(f"hessian {item['key']}"),
                file.get_tensor(f"mean {item['key']}"),
            )
            for item in index
        ]


def main() -> None:
    """Capture from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL")
    parser.add_argument("--calibration", metavar="DATA")
    parser.add_argument("--output", type=Path, default=DEFAULT_LAYERS, metavar="FILE")
    arguments = parser.parse_args()
    model, calibration = arguments.model, arguments.calibration
    if model is None:
        model, calibration = minilm()
    elif calibration is None:
        parser.error("--calibration is needed with MODEL")
    capture(model, str(calibration), arguments.output)


if __name__ == "__main__":
    main()
