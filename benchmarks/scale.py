"""Memory and time of pruning Llama-shaped models of growing depth, with random weights.

    python benchmarks/scale.py --sizes 0.5 1 2 4 8 --memory-budget 500MB

A model has one width (hidden 1024, feed-forward 2816, 16 heads, vocabulary 32,000, tied head,
RMSNorm, SwiGLU; positions are not encoded, which takes no weights) and as many layers as fill the
size, in float32. Each is written tensor by tensor, pruned to 2:4 by the command line in a process
of its own, and deleted. Peak memory is what the operating system counted for that process
(`ru_maxrss`); its parts, sampled ten times a second, are memory of its own and pages of files. Time
a layer is that of the CPUs, which other work on the machine changes less than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

GB = 10**9
HIDDEN, FEED_FORWARD, HEADS, VOCABULARY = 1024, 2816, 16, 32_000
SEQUENCE, FEEDS = 64, 8
LAYER_BYTES = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FEED_FORWARD)
EMBEDDING_BYTES = 4 * VOCABULARY * HIDDEN


class Graph:
    """A graph that is being written: large weights go to `data` as they are made."""

    def __init__(self, data: BinaryIO, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._data = data
        self._random = np.random.default_rng(seed)

    def weight(self, name: str, *shape: int) -> str:
        """Write a random weight of the standard deviation that keeps a linear's scale."""
        array = self._random.standard_normal(shape, np.float32)
        array /= np.float32(np.sqrt(shape[0]))
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": Path(self._data.name).name, "offset": self._data.tell()}
        for key, value in {**place, "length": array.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(array.data)
        self.initializers.append(tensor)
        return name

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        """Add a small tensor that is stored in the model itself."""
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(self, operator: str, *inputs: str, name: str, **attributes: Any) -> str:
        """Add a node whose one output has its name."""
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def norm(self, x: str, name: str) -> str:
        """RMSNorm, as exporters write it."""
        scale = self.constant(f"{name}.scale", np.ones(HIDDEN))
        square = self.add("Mul", x, x, name=f"{name}/square")
        mean = self.add("ReduceMean", square, "last", name=f"{name}/mean", keepdims=1)
        shifted = self.add("Add", mean, "epsilon", name=f"{name}/shift")
        root = self.add("Sqrt", shifted, name=f"{name}/root")
        divided = self.add("Div", x, root, name=f"{name}/divide")
        return self.add("Mul", divided, scale, name=f"{name}/norm")

    def linear(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """A MatMul without bias."""
        return self.add(
            "MatMul", x, self.weight(f"{name}.weight", inputs, outputs), name=f"{name}/matmul"
        )


def _layer(graph: Graph, x: str, name: str) -> str:
    read = graph.norm(x, f"{name}.attention_norm")
    heads = {}
    for part, order in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
        flat = graph.linear(read, f"{name}.{part}", HIDDEN, HIDDEN)
        split = graph.add("Reshape", flat, "split", name=f"{name}.{part}/split")
        heads[part] = graph.add("Transpose", split, name=f"{name}.{part}/heads", perm=order)
    scores = graph.add("MatMul", heads["q"], heads["k"], name=f"{name}/scores")
    scaled = graph.add("Mul", scores, "scaling", name=f"{name}/scaled")
    masked = graph.add("Add", scaled, "mask", name=f"{name}/masked")
    shares = graph.add("Softmax", masked, name=f"{name}/shares", axis=-1)
    mixed = graph.add("MatMul", shares, heads["v"], name=f"{name}/mixed")
    back = graph.add("Transpose", mixed, name=f"{name}/back", perm=(0, 2, 1, 3))
    joined = graph.add("Reshape", back, "join", name=f"{name}/joined")
    attended = graph.linear(joined, f"{name}.o", HIDDEN, HIDDEN)
    x = graph.add("Add", x, attended, name=f"{name}/attention")

    read = graph.norm(x, f"{name}.feed_forward_norm")
    gate = graph.linear(read, f"{name}.gate", HIDDEN, FEED_FORWARD)
    up = graph.linear(read, f"{name}.up", HIDDEN, FEED_FORWARD)
    share = graph.add("Sigmoid", gate, name=f"{name}/sigmoid")
    silu = graph.add("Mul", gate, share, name=f"{name}/silu")
    gated = graph.add("Mul", silu, up, name=f"{name}/gated")
    down = graph.linear(gated, f"{name}.down", FEED_FORWARD, HIDDEN)
    return graph.add("Add", x, down, name=f"{name}/feed_forward")


def write_model(path: Path, layers: int) -> None:
    """Write a model, `input_ids (1, 64)` to `logits (1, 64, 32000)`, its weights beside it."""
    with path.with_suffix(".data").open("wb") as data:
        graph = Graph(data)
        graph.constant("last", [-1], np.int64)
        graph.constant("epsilon", 1e-5)
        graph.constant("split", [1, SEQUENCE, HEADS, HIDDEN // HEADS], np.int64)
        graph.constant("join", [1, SEQUENCE, HIDDEN], np.int64)
        graph.constant("scaling", (HIDDEN // HEADS) ** -0.5)
        graph.constant("mask", np.triu(np.full((SEQUENCE, SEQUENCE), -1e9), 1))
        embedding = graph.weight("embedding", VOCABULARY, HIDDEN)
        x = graph.add("Gather", embedding, "input_ids", name="embed")
        for layer in range(layers):
            x = _layer(graph, x, f"layers.{layer}")
        x = graph.norm(x, "norm")
        head = graph.add("Transpose", embedding, name="head", perm=(1, 0))
        graph.add("MatMul", x, head, name="logits")
    shape = [1, SEQUENCE]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            f"llama_{layers}",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, shape)],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape, VOCABULARY])],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=10,
    )
    path.write_bytes(model.SerializeToString())


def run_measured(command: list[str]) -> dict[str, float]:
    """Run a command; return its seconds, by the clock and of CPUs, and its peaks in bytes.

    What the system counts for a child begins at the peak of the process that starts it, which
    must therefore stay small: this one holds one tensor at a time.
    """
    peaks = {"own": 0, "files": 0}
    started = time.perf_counter()
    child = os.posix_spawn(command[0], command, os.environ)
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.1):
            try:
                status = Path(f"/proc/{child}/status").read_text()
            except FileNotFoundError:  # not Linux, or the process has just ended
                return
            fields = dict(line.split(":", 1) for line in status.splitlines())
            for name, field in (("own", "RssAnon"), ("files", "RssFile")):
                now = int(fields.get(field, "0 kB").split()[0]) * 1024
                peaks[name] = max(peaks[name], now)

    sampler = threading.Thread(target=sample)
    sampler.start()
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - started
    ended.set()
    sampler.join()
    if status != 0:
        raise SystemExit(f"exit code {os.waitstatus_to_exitcode(status)}: {' '.join(command)}")
    unit = 1 if sys.platform == "darwin" else 1024
    cpu = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu": cpu, "peak": usage.ru_maxrss * unit, **peaks}


def measure(size: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Write, prune and delete one model of about `size` GB."""
    layers = max(1, round((size * GB - EMBEDDING_BYTES) / LAYER_BYTES))
    with tempfile.TemporaryDirectory(prefix="scale-", dir=arguments.folder) as name:
        folder = Path(name)
        write_model(folder / "dense.onnx", layers)
        stored = (folder / "dense.data").stat().st_size
        if shutil.disk_usage(folder).free < 2 * stored:
            raise SystemExit(f"{folder}: no room for the sparse model of {stored / GB:.1f} GB")
        (folder / "feeds").mkdir()
        random = np.random.default_rng(0)
        for feed in range(FEEDS):
            ids = random.integers(0, VOCABULARY, (1, SEQUENCE))
            np.savez(folder / f"feeds/{feed}.npz", input_ids=ids)
        command = [sys.executable, "-m", "iobs_onnx", "prune", str(folder / "dense.onnx")]
        command += ["--calibration", str(folder / "feeds"), "--sparsity", "2:4", "--quiet"]
        command += ["--memory-budget", arguments.memory_budget]
        command += ["--output", str(folder / "sparse.onnx"), "--report-dir", str(folder / "report")]
        measured = run_measured([*command, *arguments.options])
        report = json.loads((folder / "report/report.json").read_text())
    return {
        "bytes": stored,
        "layers": layers,
        "sites": report["totals"]["sites"],
        "sparsity": report["totals"]["sparsity"],
        "seconds_by_step": report["seconds"],
        **measured,
    }


def main() -> None:
    """Measure every size and print one row each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.5, 1, 2, 4, 8], metavar="GB")
    parser.add_argument("--memory-budget", default="500MB")
    parser.add_argument("--folder", type=Path, help="where models are made; twice the size is used")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--options", nargs=argparse.REMAINDER, default=["--preset", "fast"], help="for prune"
    )
    arguments = parser.parse_args()
    results = []
    for size in arguments.sizes:
        results.append(measure(size, arguments))
        print(json.dumps(results[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))
    options = " ".join(["--memory-budget", arguments.memory_budget, *arguments.options])
    table = Table(title=f"2:4, {options}")
    memory = ("peak GB", "own GB", "files GB")
    for heading in ("model GB", "layers", *memory, "seconds", "CPU s a layer"):
        table.add_column(heading, justify="right")
    for row in results:
        peaks = [f"{row[name] / GB:.2f}" for name in ("peak", "own", "files")]
        seconds = (f"{row['seconds']:.0f}", f"{row['cpu'] / row['layers']:.2f}")
        table.add_row(f"{row['bytes'] / GB:.2f}", str(row["layers"]), *peaks, *seconds)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
