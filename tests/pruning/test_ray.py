"""Real workers on a Ray cluster of three nodes on this machine."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import onnx
import pytest

import iobs_onnx
from iobs_onnx.errors import OptionError

ray = pytest.importorskip("ray")
logger = logging.getLogger(__name__)
Feeds = list[dict[str, np.ndarray]]
# One thread everywhere: the order in which a BLAS adds may depend on their number.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
pytestmark = [
    pytest.mark.slow,
    # Of Ray's own sockets and files.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(scope="module")
def two_layers(minilm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM as far as its second layer."""
    path = tmp_path_factory.mktemp("minilm") / "two.onnx"
    onnx.utils.extract_model(
        minilm_model, path, ["input_ids", "attention_mask", "token_type_ids"], ["layer_norm_4"]
    )
    return path


@pytest.fixture
def case(request: pytest.FixtureRequest, shared: Path) -> tuple[Path, Feeds]:
    rng = np.random.default_rng(0)
    if request.param == "minilm":
        return request.getfixturevalue("two_layers"), request.getfixturevalue("minilm_feeds")
    if request.param == "resnet20":
        images = [rng.standard_normal((8, 3, 32, 32)).astype(np.float32) for _ in range(20)]
        return shared / "models" / "resnet20.onnx", [{"x": image} for image in images]
    ids = [rng.integers(3, 30000, (2, 24)) for _ in range(7)]
    return shared / "models" / "stories15M.onnx", [{"input_ids": row} for row in ids]


def written(model: Path, feeds: Feeds, folder: Path, **options: Any) -> str:
    output = folder / f"{len(list(folder.glob('*.onnx')))}.onnx"
    iobs_onnx.prune(
        model, calibration=feeds, output=output, sparsity="2:4", preset="fast", **options
    )
    return hashlib.sha256(output.read_bytes()).hexdigest()


@pytest.mark.parametrize("case", ["resnet20", "minilm", "stories15M"], indirect=True)
def test_any_number_of_workers_writes_the_same_bytes(
    case: tuple[Path, Feeds], address: str, tmp_path: Path
) -> None:
    here = written(*case, tmp_path)
    for count in (1, 2, 3, 5):
        assert written(*case, tmp_path, ray=address, workers=count) == here


def test_what_workers_log_is_told_here(
    mlp: Path, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "iobs_onnx"):
        iobs_onnx.prune(
            mlp / "mlp.onnx", calibration=mlp / "a.npz", sparsity="2:4", ray=address, workers=2
        )
    where = f"worker on {socket.gethostname()}: ONNX Runtime"
    assert any(message.startswith(where) for message in caplog.messages)


def workers() -> list[int]:
    """Return the processes of workers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if folder.joinpath("cmdline").read_bytes().startswith(b"ray::Worker"):
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize("case", ["resnet20"], indirect=True)
def test_killed_workers_change_no_byte(
    case: tuple[Path, Feeds], address: str, tmp_path: Path
) -> None:
    here = written(*case, tmp_path)
    chance, killed, over = random.Random(0), [], Event()

    def kill() -> None:
        while not over.wait(chance.uniform(2, 8)):
            if found := workers():
                killed.append(chance.choice(found))
                with suppress(ProcessLookupError):
                    os.kill(killed[-1], signal.SIGKILL)

    murderer = Thread(target=kill)
    murderer.start()
    try:
        while len(killed) < 20:
            assert written(*case, tmp_path, ray=address, workers=3) == here
    finally:
        over.set()
        murderer.join()
    logger.info("%d workers killed", len(killed))


@pytest.mark.parametrize("case", ["resnet20"], indirect=True)
def test_a_killed_driver_goes_on(case: tuple[Path, Feeds], tmp_path: Path) -> None:
    model, feeds = case
    data, here, resumed = (tmp_path / name for name in ("data.npz", "here.onnx", "resumed.onnx"))
    np.savez(data, x=np.concatenate([feed["x"] for feed in feeds]))
    command = [sys.executable, "-m", "iobs_onnx", "prune", model, "--calibration", data]
    command += ["--sparsity", "2:4", "--preset", "fast", "--batch-size", "8"]
    subprocess.run([*command, "--output", here], check=True, capture_output=True)
    command += ["--work-dir", tmp_path / "work", "--output", resumed]
    chance, killed = random.Random(0), 0
    for count in (1, 2, 3, 2, 1):
        process = subprocess.Popen(
            [*command, "--workers", str(count)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        with suppress(subprocess.TimeoutExpired):
            process.wait(chance.uniform(5, 40))
        killed += process.poll() is None
        process.kill()
        process.communicate()
    logger.info("%d drivers killed", killed)
    subprocess.run([*command, "--workers", "2"], check=True, capture_output=True)
    assert resumed.read_bytes() == here.read_bytes()


def test_an_address_that_answers_nothing(mlp: Path) -> None:
    def refused(address: str) -> str:
        with pytest.raises(OptionError) as caught:
            iobs_onnx.prune(
                mlp / "mlp.onnx", calibration=mlp / "a.npz", sparsity="2:4", ray=address
            )
        return str(caught.value)

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        expected = f"ray {address}: nothing answers there (timed out); give host:port of the head"
        assert refused(address).startswith(expected)
    assert refused(address).startswith(f"ray {address}: nothing answers there ([Errno 111]")
