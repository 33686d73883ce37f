"""Feed broken models and archives to the command line, in child processes that are watched.

    PYTHONPATH=tests python tests/fuzz/fuzz_run.py --count 20000

Every input is made from its number, so that a failure can be made again with `--first N --count 1`.
Most models are inspected; every tenth is pruned, in both cases through the command line. A failure
is a traceback, more than one line of error, an unexpected exit code, a file left behind, a child
that dies, that takes more than `LIMIT_SECONDS` over one input, or more than `LIMIT_BYTES`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import random
import re
import resource
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import fuzz_models
import fuzz_mutate
import numpy as np
import onnx

from iobs_onnx import cli

LIMIT_SECONDS = 20
# Above what the imports take; torch and ONNX Runtime map several GB that they never touch.
LIMIT_BYTES = 4 * 2**30
_CASES_OF_A_CHILD = 1000


class Inputs:
    """The valid inputs, and how case number N is made of them."""

    def __init__(self) -> None:
        models = {name: build() for name, build in fuzz_models.MODELS.items()}
        self._models = {name: model.SerializeToString() for name, model in models.items()}
        self._feeds = {name: archive(fuzz_models.feeds(m)) for name, m in models.items()}
        self._models["external"], self._data = _external(models["mlp"])
        self._feeds["external"] = self._feeds["mlp"]

    def write(self, number: int, folder: Path) -> str:
        """Write model, external data and feeds of a case; return what is done with them."""
        rng = random.Random(number)
        names = sorted(self._models)
        name, other = rng.choice(names), rng.choice(names)
        model, feeds = self._models[name], self._feeds[name]
        kind = "feeds" if number % 20 == 0 else "prune" if number % 10 == 5 else "inspect"
        if kind == "feeds":
            feeds = _mutate_archive(feeds, rng)
        else:
            mutate = rng.choice(fuzz_mutate.MUTATORS)
            model = mutate(model, self._models[other], rng)
        (folder / "model.onnx").write_bytes(model)
        (folder / "weights.bin").write_bytes(self._data)
        (folder / "feeds.npz").write_bytes(feeds)
        return kind


def archive(feeds: fuzz_models.Feeds) -> bytes:
    """Return an `.npz` file."""
    stream = io.BytesIO()
    np.savez(stream, **feeds)
    return stream.getvalue()


def _external(model: onnx.ModelProto) -> tuple[bytes, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.onnx")
        onnx.save(
            model, path, save_as_external_data=True, location="weights.bin", size_threshold=64
        )
        return path.read_bytes(), Path(folder, "weights.bin").read_bytes()


def _mutate_archive(content: bytes, rng: random.Random) -> bytes:
    """Damage an archive from outside, or one of the arrays inside a sound one."""
    if rng.random() < 0.5:
        return fuzz_mutate.mutate_bytes(content, content, rng)
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        for info in old.infolist():
            member = old.read(info)
            if rng.random() < 0.5:
                header = rng.choice(fuzz_mutate.HEADERS).ljust(118)
                member = member[:8] + len(header).to_bytes(2, "little") + header + member[128:]
            else:
                member = fuzz_mutate.mutate_bytes(member, member, rng)
            new.writestr(info.filename, member, rng.choice((0, 8)))
    return stream.getvalue()


def examine(kind: str, folder: Path) -> str:
    """Run the command line on the case in `folder`; return the outcome, or raise."""
    before = sorted(path.name for path in folder.iterdir())
    model, output = str(folder / "model.onnx"), str(folder / "out.onnx")
    if kind == "inspect":
        arguments = ["inspect", model, "--json"]
    else:
        # One damaged model or archive: the other one fits it.
        arguments = ["prune", model, "--calibration", str(folder / "feeds.npz"), "--quiet"]
        arguments += ["--sparsity", "2:4", "--output", output, "--preset", "fast"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    told = err.getvalue().splitlines()
    if code not in (0, 1, 2):
        raise AssertionError(f"exit code {code}: {err.getvalue()}")
    if code and len(told) != 1:
        raise AssertionError(f"{len(told)} lines of error: {err.getvalue()}")
    allowed = [*before, "out.onnx", "out.onnx.data"] if code == 0 else before
    if left := [p.name for p in folder.iterdir() if p.name not in allowed]:
        raise AssertionError(f"left behind: {left}")
    return f"{kind}: {('done', 'a check failed', 'refused')[code]}"


def run_case(inputs: Inputs, number: int) -> str:
    """Make a case in a folder of its own and examine it."""
    with tempfile.TemporaryDirectory(prefix="iobs-fuzz-") as folder:
        return examine(inputs.write(number, Path(folder)), Path(folder))


def work(first: int, last: int, pipe: Connection) -> None:
    """Examine cases one by one, and tell the parent of each before and after."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    inputs = Inputs()
    # Loaded before the limit is set, so that it bounds the inputs alone.
    import iobs_onnx.pruning.pipeline  # noqa: F401

    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, used + LIMIT_BYTES))
    for number in range(first, last):
        pipe.send((number, None))
        try:
            pipe.send((number, run_case(inputs, number)))
        except (AssertionError, MemoryError) as error:
            pipe.send((number, f"FAILED {type(error).__name__} {error}"))
    pipe.close()


def watch(first: int, last: int, tell: Callable[[int, str], None]) -> int:
    """Run one child; return the number of the case that comes after the last one it finished."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(first, last, send))
    child.start()
    send.close()
    current = None
    try:
        while receive.poll(LIMIT_SECONDS if current is not None else 120):
            current, outcome = receive.recv()
            if outcome is not None:
                tell(current, outcome)
                first = current + 1
    except EOFError:
        child.join()
    else:
        tell(first, f"FAILED it hangs for more than {LIMIT_SECONDS} s")
        child.kill()
        child.join()
        return first + 1
    if child.exitcode:
        tell(first, f"FAILED the process died with {child.exitcode}")
        return first + 1
    return last


def fuzz(first: int, count: int, seconds: float | None = None) -> tuple[Counter[str], list[str]]:
    """Examine `count` cases, fewer when time is over; return outcomes and failures."""
    outcomes: Counter[str] = Counter()
    failures: list[str] = []

    def tell(number: int, outcome: str) -> None:
        if outcome.startswith("FAILED"):
            failures.append(f"case {number}: {outcome}")
            outcome = "FAILED"
        outcomes[outcome] += 1

    started, stop = time.monotonic(), first + count
    while first < stop and (seconds is None or time.monotonic() - started < seconds):
        first = watch(first, min(stop, first + _CASES_OF_A_CHILD), tell)
    return outcomes, failures


def main() -> int:
    """Fuzz and print the counts; 1 if there was a failure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    arguments = parser.parse_args()
    started = time.monotonic()
    outcomes, failures = fuzz(arguments.first, arguments.count)
    lines = [f"{number:7} {outcome}" for outcome, number in sorted(outcomes.items())]
    lines += failures[:50]
    lines.append(
        f"{sum(outcomes.values())} mutated inputs in {time.monotonic() - started:.0f} s, "
        f"{len(failures)} failures"
    )
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
