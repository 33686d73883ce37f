"""Calibration feeds for the other real models that the benchmarks take.

    python benchmarks/prepare.py cifar IMAGES.npz --output images.npz
    python benchmarks/prepare.py stories STORIES.json --tokenizer FILE.model --output folder

`cifar`: `x` uint8 NHWC becomes the normalised NCHW input of the CIFAR-10 ResNets. `stories`: a JSON
list of texts becomes token feeds of a SentencePiece causal language model, one story a feed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

MEAN, STD = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))


def cifar(source: Path, output: Path, count: int) -> None:
    """Write `count` normalised images as one `.npz`."""
    images = np.load(source)["x"][:count] / 255
    np.savez(output, x=((images - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32))


def stories(source: Path, output: Path, count: int, tokenizer: Path, length: int = 256) -> None:
    """Write `count` stories, cut at `length` tokens, as a directory of feeds."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(tokenizer))
    output.mkdir(parents=True, exist_ok=True)
    texts = json.loads(source.read_text())[:count]
    for number, text in enumerate(texts):
        ids = [processor.bos_id(), *processor.encode(text)][:length]
        np.savez(output / f"{number:04d}.npz", input_ids=np.array([ids], np.int64))


def main() -> None:
    """Prepare feeds from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("cifar", "stories"))
    parser.add_argument("source", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--count", type=int)
    arguments = parser.parse_args()
    if arguments.kind == "cifar":
        cifar(arguments.source, arguments.output, arguments.count or 512)
    elif arguments.tokenizer is None:
        parser.error("--tokenizer is needed for stories")
    else:
        stories(arguments.source, arguments.output, arguments.count or 60, arguments.tokenizer)


if __name__ == "__main__":
    main()
