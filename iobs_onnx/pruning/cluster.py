"""The Ray cluster that workers run on: one that is there, or one that is started for a run."""

from __future__ import annotations

import os
import socket
from typing import Any

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import OptionError

# Seconds in which the head of a cluster, or a worker that has nothing to do, has to answer.
PATIENCE = 5.0
# The preface of HTTP/2 and an empty SETTINGS frame, which its servers answer at once.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_QUIET = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}


def connect(ray: Any, config: PruneConfig) -> None:
    """Connect to the cluster that the options name, or start one on this machine.

    Args:
        ray: the module.
        config: the options; `ray` is `host:port` of a head, `auto` for one here, or None.

    Raises:
        OptionError: nothing answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if config.ray is None:
        # Workers do the work, and would by default yield to whatever else runs.
        os.environ.setdefault("RAY_worker_niceness", "0")
        ray.init(num_cpus=max(config.workers or 1, os.cpu_count() or 1), **_QUIET)
    else:
        _join(ray, config.ray)


def _join(ray: Any, address: str) -> None:
    if address != "auto":
        try:
            _require_answer(address)
        except (OSError, OverflowError) as error:
            raise OptionError(
                f"ray {address}: nothing answers there ({error}); give host:port of the head, as "
                "`ray start --head` names it"
            ) from error
    try:
        ray.init(address=address, **_QUIET)
    except (ConnectionError, RuntimeError, ValueError) as error:
        fault = " ".join(str(error).split())[:200]
        raise OptionError(f"ray {address}: cannot connect: {fault}") from error


def _require_answer(address: str) -> None:
    """Raise OSError where no HTTP/2 server is at `host:port`: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        if os.environ.get("RAY_USE_TLS", "0") != "0":
            return
        connection.sendall(_HELLO)
        if not connection.recv(1):
            raise ConnectionError("the connection is closed")
