"""Two runs at one place, full disks, removed folders and signals: one clear line, nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from iobs_onnx.cli import main

WIDTH = 16
# Feeds that wait until the file `go` is there; those of `endless` do not end, those of `removing`
# take the run's temporary folder away.
FEEDS = """
import os, shutil, time
from pathlib import Path
import numpy as np

def rows(count):
    return [{"x": np.random.default_rng(i).normal(size=(64, 16)).astype("f")} for i in range(count)]

def few():
    return rows(4)

def waiting():
    Path("started").touch()
    while not Path("go").exists():
        time.sleep(0.01)
    return rows(4)

def endless():
    Path("started").touch()
    while True:
        time.sleep(0.02)
        yield rows(1)[0]

def removing():
    yield rows(1)[0]
    for folder in Path(os.environ["TMPDIR"]).iterdir():
        shutil.rmtree(folder)
    yield from rows(3)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model of two linears, feeds, and an empty folder for temporary files."""
    draw = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="a"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "b"], ["y"], name="b"),
    ]
    weights = [
        numpy_helper.from_array(draw.normal(size=(WIDTH, WIDTH)).astype(np.float32), name)
        for name in ("a", "b")
    ]
    infos = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", WIDTH])
        for name in ("x", "y")
    ]
    graph = helper.make_graph(nodes, "two", infos[:1], infos[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "slow.py").write_text(FEEDS)
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)  # read TMPDIR again
    return tmp_path


def command(feeds: str, *more: str, output: str = "out.onnx") -> list[str]:
    return [
        *("prune", "model.onnx", "--calibration", f"slow:{feeds}", "--sparsity", "2:4"),
        *("--preset", "fast", "--quiet", "--output", output, *more),
    ]


def start(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "iobs_onnx", *arguments], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not Path("started").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def test_the_second_run_is_refused_and_the_first_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(*command("waiting", "--work-dir", "work"))
    deadline = time.monotonic() + 60
    while not (locks := [*here.glob(".out.onnx.lock")]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert main(command("few", "--work-dir", "other")) == 2
    assert "output out.onnx: another run uses it" in capsys.readouterr().err
    Path("go").touch()
    _, said = first.communicate(timeout=120)
    assert first.returncode == 0, said
    assert Path("out.onnx").is_file()
    assert not any(lock.exists() for lock in locks)


def test_a_work_folder_is_locked_before_anything_in_it_is_deleted(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(*command("endless", "--work-dir", "work", "--memory-budget", "1KB"))
    deadline = time.monotonic() + 60
    while not any(here.glob("work/streams-*/*.npy")):
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    held = set(here.glob("work/streams-*/*.npy"))
    assert main(command("few", "--work-dir", "work", output="b.onnx")) == 2
    said = capsys.readouterr().err
    assert "work-dir work: another run uses it" in said
    assert held <= set(here.glob("work/streams-*/*.npy"))
    assert first.poll() is None
    first.kill()  # the system lets go of the lock
    first.communicate()
    again = command("few", "--work-dir", "work", "--memory-budget", "1KB", output="b.onnx")
    assert main(again) == 0
    assert not any(here.glob("work/streams-*"))


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_behind(here: Path, kind: signal.Signals) -> None:
    if signal.getsignal(kind) is signal.SIG_IGN:
        pytest.skip("whoever runs the tests ignores it, as nohup does, and so does the program")
    process = start(*command("endless"))
    deadline = time.monotonic() + 60
    while not any(here.glob("temporary/iobs-onnx-*/streams-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(kind)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + kind
    assert said == "iobs-onnx: terminated; nothing was written\n"
    assert not any(here.glob("temporary/iobs*"))
    assert not any(here.glob("out.onnx*"))
    assert not any(here.glob(".out.onnx*"))


@pytest.fixture(params=[None, 2048], ids=["disk", "limit"])
def full(request: pytest.FixtureRequest, here: Path) -> Iterator[tuple[Path, int | None]]:
    """A folder for temporary files on a disk of 64 KiB; or any, and how long a file may be."""
    folder = here / "temporary"
    (folder / "filling").touch()
    if request.param is not None:
        yield folder, request.param
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    (folder / "filling").write_bytes(bytes(44 << 10))
    yield folder, None
    subprocess.run(["umount", str(folder)], check=True)


# The limit holds for whatever a process writes, the log of these tests too: it gets one of its own.
_LIMITED = """
import resource, sys
from iobs_onnx.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("work", [True, False])
def test_a_full_disk_is_one_clear_line(full: tuple[Path, int | None], work: bool) -> None:
    folder, limit = full
    Path("go").touch()
    more = ["--work-dir", str(folder / "work")] if work else []
    run = ["-m", "iobs_onnx"] if limit is None else ["-c", _LIMITED, str(limit)]
    process = subprocess.run(
        [sys.executable, *run, *command("waiting", "--memory-budget", "1KB", *more)],
        capture_output=True,
        text=True,
        check=False,
    )
    said = process.stderr
    assert process.returncode == 2, said
    assert said.count("\n") == 1
    assert str(folder) in said
    assert "free some space, or" in said
    assert ("--work-dir" if work else "TMPDIR") in said
    assert not Path("out.onnx").exists()
    if not work:
        assert not any(folder.glob("iobs*"))


def test_a_removed_temporary_folder_is_one_clear_line(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("removing", "--memory-budget", "1KB")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "was removed while this run was using it; start it again" in said
    assert not any(here.glob("temporary/iobs*"))
    assert os.environ["TMPDIR"] in said


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_closed_pipe_ends_quietly_as_by_its_signal(here: Path, more: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "iobs_onnx", "inspect", "model.onnx", *more],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (128 + signal.SIGPIPE, "")
