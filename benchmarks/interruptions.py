"""Kill a run at random moments, let it go on, and see that it ends in the bytes of a whole run.

    python benchmarks/interruptions.py --kills 20 MODEL.onnx --calibration DATA --sparsity 2:4 ...

All but `--kills` and `--seed` is handed to `iobs-onnx prune`, without `--output` and `--work-dir`.
After every kill the output must be absent, or whole; and what is left beside it may only be hidden.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def digest(path: Path) -> str:
    """Return the SHA-256 of a model and the data beside it."""
    files = sorted(path.parent.glob(f"{path.name}*"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main() -> None:
    """Kill as often as asked, and print what was found each time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments, flags = parser.parse_known_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        output, work = folder / "out" / "sparse.onnx", folder / "work"
        output.parent.mkdir()
        command = [sys.executable, "-m", "iobs_onnx", "prune", *flags, "--quiet"]
        command += ["--output", str(output)]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        whole, seconds = digest(output), time.perf_counter() - started
        output.unlink()
        print(f"uninterrupted: {seconds:.1f} s, {whole[:16]}", flush=True)
        kills = finished = 0
        while kills < arguments.kills:
            running = subprocess.Popen([*command, "--work-dir", str(work)])
            try:
                code = running.wait(moments.uniform(0, seconds))
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
                code, kills = None, kills + 1
            if code not in (None, 0):
                raise SystemExit(f"a run that went on ended with {code}")
            there = output.exists()
            if there and digest(output) != whole:
                raise SystemExit(f"{output} looks finished and is not")
            left = [path.name for path in output.parent.iterdir() if path.name[0] != "."]
            if left not in ([], [output.name]):
                raise SystemExit(f"left beside the output: {left}")
            solved = len(list(work.glob("*segment*.json"))) if work.exists() else 0
            told = "whole, the same bytes" if there else f"{solved} segments solved"
            print(f"kill {kills}: {told}", flush=True)
            if there:
                finished += 1
                shutil.rmtree(output.parent)
                shutil.rmtree(work)
                output.parent.mkdir()
        print(f"{kills} kills, {finished} runs ended, all in the same bytes")


if __name__ == "__main__":
    main()
