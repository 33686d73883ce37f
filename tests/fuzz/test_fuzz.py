"""A slice of `make fuzz`, and proof that it sees what it looks for."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fuzz_models
import fuzz_run
import onnx
import pytest

from iobs_onnx import cli
from iobs_onnx.passes import load_model, unknown_to_checker


@pytest.mark.parametrize("name", fuzz_models.MODELS)
def test_what_is_mutated_is_valid(name: str, tmp_path: Path) -> None:
    model = fuzz_models.MODELS[name]()
    if not unknown_to_checker(load_model(model)):
        onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "feeds.npz").write_bytes(fuzz_run.archive(fuzz_models.feeds(model)))
    assert fuzz_run.examine("inspect", tmp_path) == "inspect: done"
    assert fuzz_run.examine("prune", tmp_path) == "prune: done"


def test_a_slice() -> None:
    """Here without bounds on memory and time; what would kill the process would kill the test."""
    inputs, outcomes = fuzz_run.Inputs(), set()
    for number in range(1_000_000, 1_000_200):
        outcomes.add(fuzz_run.run_case(inputs, number))
    assert {"inspect: done", "inspect: refused", "prune: refused", "feeds: refused"} <= outcomes


def leave(arguments: list[str]) -> int:
    Path(arguments[1]).with_name("rest").touch()
    return 0


def babble(_: list[str]) -> int:
    sys.stderr.write("one\ntwo\n")
    return 2


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (lambda _: 3, "exit code 3"),
        (babble, "2 lines of error"),
        (lambda _: 2, "0 lines of error"),
        (leave, "left behind: .'rest'"),
    ],
)
def test_failures_are_seen(
    main: Callable[[list[str]], int], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "main", main)
    with pytest.raises(AssertionError, match=message):
        fuzz_run.examine("inspect", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("examine", "message"),
    [
        (lambda *_: os._exit(11), "case 7: FAILED the process died with 11"),
        (lambda *_: time.sleep(60), "case 7: FAILED it hangs for more than 1 s"),
        (lambda *_: bytearray(2**33) and "", "case 7: FAILED MemoryError"),
    ],
)
def test_deaths_and_hangs_are_seen(
    examine: Callable[..., str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzz_run, "examine", examine)
    monkeypatch.setattr(fuzz_run, "LIMIT_SECONDS", 1)
    outcomes, failures = fuzz_run.fuzz(7, 1)
    assert dict(outcomes) == {"FAILED": 1}
    assert failures[0].startswith(message)
