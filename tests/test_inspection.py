"""All that a model stores is accounted for: a site, declined, or named as no candidate."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

import iobs_onnx

ROOT = Path(__file__).resolve().parent
STORED = sorted((ROOT / "data").rglob("*.onnx"))


def stored(proto: onnx.ModelProto) -> dict[str, int]:
    """Return the tensors of a model by name with their sizes, read from the protobuf alone."""
    found: dict[str, int] = {}
    pending = [proto.graph, *proto.functions]
    while pending:
        scope = pending.pop()
        for tensor in getattr(scope, "initializer", ()):
            found[tensor.name] = math.prod(tensor.dims)
        for node in scope.node:
            for attribute in node.attribute:
                pending += [attribute.g] * attribute.HasField("g") + [*attribute.graphs]
                if attribute.HasField("t"):
                    found[node.output[0]] = math.prod(attribute.t.dims)
    return found


def listed(path: Path) -> dict[str, int]:
    found = iobs_onnx.inspect(path)
    items = (*found.sites, *found.declined, *found.others)
    return {item.initializer: math.prod(item.shape) for item in items}


def require_account(path: Path) -> None:
    own, named = stored(onnx.load(path, load_external_data=False)), listed(path)
    assert {name: named.get(name) for name in own} == own
    for item in iobs_onnx.inspect(path).others:
        assert item.reason
        assert item.matrix == ("no product is known" in item.reason)


@pytest.mark.parametrize("path", STORED, ids=[path.parent.name + path.stem for path in STORED])
def test_every_number_of_a_stored_model_is_accounted_for(path: Path) -> None:
    require_account(path)


def test_every_number_of_trained_models(magika_model: Path, minilm_model: Path) -> None:
    require_account(magika_model)
    require_account(minilm_model)


def test_models_beside_the_checkout(shared: Path) -> None:
    for path in sorted((shared / "models").glob("*.onnx")):
        require_account(path)


def _corpus() -> Iterator[Path]:
    spec = importlib.util.find_spec("onnx")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0], "backend", "test", "data")
    yield from sorted(folder.rglob("*.onnx"))


@pytest.mark.slow
def test_the_corpus_of_the_onnx_package() -> None:
    count = 0
    for path in _corpus():
        try:
            iobs_onnx.inspect(path)
        except iobs_onnx.errors.InputError:
            continue  # refused as a whole, for a reason that other tests hold
        require_account(path)
        count += 1
    assert count > 50


def test_a_large_matrix_is_named_with_who_reads_it() -> None:
    found = iobs_onnx.inspect(ROOT / "data" / "mixtral.onnx")
    (table,) = [item for item in found.others if item.matrix and math.prod(item.shape) > 1000]
    assert "embed_tokens" in table.initializer
    assert table.reason == "read by Gather: no product is known to multiply by it"
