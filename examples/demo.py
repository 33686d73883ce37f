"""Prune a real transformer to 2:4, look at the table, and see what it cost on other text.

`make demo` runs this. It exports the embedded default model, writes calibration feeds, calls the
command line as a user would, and compares sentence embeddings of the dense and the sparse model
on text that was not calibrated on.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import minilm

from iobs_onnx.cli import main as iobs_onnx

CALIBRATION_TEXTS, HELD_OUT_TEXTS, JUDGED_TEXTS, BATCH = 512, 64, 256, 16


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/demo"), metavar="DIR")
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--solver", default="iobs")
    arguments = parser.parse_args()
    folder: Path = arguments.output

    print("exporting all-MiniLM-L6-v2 to ONNX", flush=True)
    dense = minilm.export(folder.parent / "models" / "all-MiniLM-L6-v2.onnx")
    calibrating = CALIBRATION_TEXTS + HELD_OUT_TEXTS
    texts = minilm.docstrings(calibrating + JUDGED_TEXTS)
    data = minilm.save_feeds(folder / "calibration", minilm.feeds(texts[:calibrating], batch=BATCH))
    sparse = folder / f"all-MiniLM-L6-v2.{arguments.sparsity.replace(':', 'of')}.onnx"

    prune = f"prune {dense} --calibration {data} --samples {CALIBRATION_TEXTS // BATCH} "
    prune += f"--sparsity {arguments.sparsity} --solver {arguments.solver} "
    prune += f"--compare sparsegpt --output {sparse} --report-dir {folder / 'report'}"
    verify = f"verify {sparse} --sparsity {arguments.sparsity} --dense {dense} --data {data}"
    for command in (prune, verify):
        print(f"\n$ iobs-onnx {command}", flush=True)
        if code := iobs_onnx(shlex.split(command)):
            return code

    print("\nsentence embeddings, dense against sparse, on text that was not calibrated on:")
    judged = {
        "other docstrings": texts[calibrating:],
        "language reference (another kind)": minilm.reference_passages(JUDGED_TEXTS),
    }
    for kind, passages in judged.items():
        ready = minilm.feeds(passages)
        before, after = minilm.embed(dense, ready), minilm.embed(sparse, ready)
        cosine = float((before * after).sum(1).mean())
        correlation = minilm.similarity_correlation(before, after)
        print(f"  {kind}: {len(passages)} passages, cosine {cosine:.4f}, ", end="")
        print(f"correlation of pairwise similarities {correlation:.4f}")
    print(f"\nlook at it: {folder / 'report' / 'report.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
