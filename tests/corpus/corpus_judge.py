"""What must hold of every valid model: inspected, pruned, and otherwise left as it was."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import Message

import iobs_onnx
from iobs_onnx.errors import ModelError
from iobs_onnx.passes import check_model, load_model, save_model, unknown_to_checker

Feed = Mapping[str, np.ndarray]

# Layer errors are sums over float32 activations, made in different orders.
_ERROR_SLACK = 1e-5
# What makes one complaint of ONNX Runtime differ from the next.
_PARTICULARS = r"^\[ONNXRuntimeError\] : \d+ : \w+ : |/\S+/|with name.*"


@dataclass
class Verdict:
    """What became of a model.

    Attributes:
        sites, pruned: candidates found, and weights pruned to 2:4.
        declined: reasons, each with its count.
        refused: why the model as a whole was left alone; empty if it was pruned.
    """

    sites: int = 0
    pruned: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    refused: str = ""


def judge(path: Path, feeds: Sequence[Feed], scratch: Path, preset: str | None = None) -> Verdict:
    """Prune a model file at 2:4 and at 0 % and hold both against the original.

    Args:
        path: a valid model.
        feeds: at least two, so that one can be held out; none where the model is not to be run.
        scratch: a folder for outputs.
        preset: of the solver.
    """
    found = iobs_onnx.inspect(path)
    verdict = Verdict(sites=len(found.sites), declined=Counter(d.reason for d in found.declined))
    before = _loaded(path)
    for old in scratch.iterdir():
        old.unlink()
    copy = scratch / "copy.onnx"
    save_model(load_model(path), copy)
    assert differences(before, _loaded(copy)) == []
    if not feeds:
        verdict.refused = "no feeds"
        return verdict
    complaint = _cannot_run(path, feeds)
    whole = _prune(path, feeds, "0%", scratch / "whole.onnx", None)
    half = _prune(path, feeds, "2:4", scratch / "half.onnx", preset)
    for result in (whole, half):
        if isinstance(result, str):
            assert complaint or "nothing to prune" in result, result
            verdict.refused = "nothing to prune" if "nothing to prune" in result else complaint
    if not isinstance(whole, str):
        after = _loaded(scratch / "whole.onnx")
        sparse = [tensor.values.name for tensor in before.graph.sparse_initializer]
        # These come back dense, with the values they had.
        lost = differences(before, after, sparse)
        assert not lost, lost
        expected = run(path, feeds[0])
        assert _same(expected, run(after, feeds[0])), "outputs at 0 % are not bit-identical"
    if not isinstance(half, str):
        after = _loaded(scratch / "half.onnx")
        changed = [site.initializer for site in half.report.sites]
        assert changed
        lost = differences(before, after, changed)
        assert not lost, lost
        if not unknown_to_checker(load_model(path)):
            check_model(scratch / "half.onnx")
        run(after, feeds[0])
        verdict.pruned = len(changed)
        verdict.declined = Counter(item["reason"] for item in half.report.declined)
        for site in half.report.sites:
            slack = _ERROR_SLACK * (1 + site.compared_error)
            assert site.layer_error <= site.compared_error + slack, site
    return verdict


def run(model: Path | onnx.ModelProto, feed: Feed) -> list[Any]:
    """Return the outputs of a model in ONNX Runtime on one thread."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feed))


def differences(
    before: onnx.ModelProto, after: onnx.ModelProto, changed: Sequence[str] = ()
) -> list[str]:
    """Return the paths of all fields that differ, values of the changed tensors aside.

    A field left out and one written empty are equal. A changed tensor keeps its name, type,
    shape, texts and place; its sparse form may become dense.
    """
    own = [_without_values(model, changed) for model in (before, after)]
    return [
        f"{a[0]}: {a[1]!r:.80} became {b[0]} {b[1]!r:.80}"
        for a, b in _zip(list(_fields(own[0], "")), list(_fields(own[1], "")))
        if a[0] != b[0] or not _same(a[1], b[1])
    ]


def _prune(
    path: Path, feeds: Sequence[Feed], sparsity: str, output: Path, preset: str | None
) -> iobs_onnx.PruneResult | str:
    try:
        return iobs_onnx.prune(
            path,
            calibration=feeds,
            sparsity=sparsity,
            output=output,
            preset=preset,
            # A bias that makes up for an error changes too; here only weights may.
            bias_compensation=0,
            compare="magnitude",
            provider="cpu",
            device="cpu",
        )
    except ModelError as error:
        message = str(error)
    assert not output.exists()
    assert "\n" not in message
    return message


def _cannot_run(path: Path, feeds: Sequence[Feed]) -> str:
    try:
        run(path, feeds[0])
    except Exception as error:  # ONNX Runtime's own have no common base
        fault = str(error).split("\n")[0]
        return f"ONNX Runtime cannot run the dense model: {re.sub(_PARTICULARS, '', fault):.90}"
    return ""


def _loaded(path: Path) -> onnx.ModelProto:
    """Return the model with its data inside, wherever they were."""
    model = onnx.load(path)
    for graph in _graphs(model.graph):
        for tensor in graph.initializer:
            tensor.ClearField("data_location")
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                if body.node:
                    yield from _graphs(body)


def _without_values(model: onnx.ModelProto, changed: Sequence[str]) -> onnx.ModelProto:
    own = onnx.ModelProto()
    own.CopyFrom(model)
    graph = own.graph
    sparse = [tensor for tensor in graph.sparse_initializer if tensor.values.name in changed]
    for tensor in sparse:
        graph.sparse_initializer.remove(tensor)
        graph.initializer.add(
            name=tensor.values.name, data_type=tensor.values.data_type, dims=tensor.dims
        )
    graphs = list(_graphs(graph))
    stored = [tensor for scope in graphs for tensor in scope.initializer if tensor.name in changed]
    for node in (node for scope in graphs for node in scope.node):
        if node.op_type == "Constant" and node.output[0] in changed:
            [attribute] = node.attribute
            if attribute.name == "sparse_value":
                values, dims = attribute.sparse_tensor.values, attribute.sparse_tensor.dims
                dense = onnx.TensorProto(name=values.name, data_type=values.data_type, dims=dims)
                attribute.CopyFrom(onnx.helper.make_attribute("value", dense))
            stored.append(attribute.t)
    for tensor in stored:
        for name in ("raw_data", "float_data", "double_data", "int32_data"):
            tensor.ClearField(name)
    return own


def _fields(message: Message, path: str) -> Iterator[tuple[str, Any]]:
    for descriptor in message.DESCRIPTOR.fields:
        value = getattr(message, descriptor.name)
        here = f"{path}.{descriptor.name}"
        if descriptor.message_type is None:
            yield here, list(value) if descriptor.is_repeated else value
        elif descriptor.is_repeated:
            yield here, len(value)
            for index, item in enumerate(value):
                yield from _fields(item, f"{here}[{index}]")
        elif message.HasField(descriptor.name):
            yield from _fields(value, here)


def _zip(a: list[Any], b: list[Any]) -> Iterator[tuple[Any, Any]]:
    nothing = ("nothing", None)
    for index in range(max(len(a), len(b))):
        yield (
            a[index] if index < len(a) else nothing,
            b[index] if index < len(b) else nothing,
        )


def _same(a: Any, b: Any) -> bool:
    """Compare to the bit; NaN equals NaN."""
    if isinstance(a, np.ndarray):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and (a.tobytes() == b.tobytes() if a.dtype != object else bool((a == b).all()))
        )
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b or (a != a and b != b))  # noqa: PLR0124  # NaN alone differs from itself
