"""The whole sequence on real models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import iobs_onnx
from iobs_onnx.errors import DataError, DependencyError, ModelError, OptionError
from iobs_onnx.passes import check_pattern, find_sites, load_model, stored_slots
from iobs_onnx.pruning.pipeline import PruneResult
from iobs_onnx.pruning.progress import Progress
from iobs_onnx.report.tables import render
from iobs_onnx.sparsity import NM

Feed = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def sparse_minilm(
    minilm_model: Path, minilm_feeds: list[Feed], tmp_path_factory: pytest.TempPathFactory
) -> PruneResult:
    """MiniLM pruned to 2:4 with the defaults, SparseGPT beside it."""
    return iobs_onnx.prune(
        minilm_model,
        calibration=minilm_feeds,
        sparsity="2:4",
        output=tmp_path_factory.mktemp("minilm") / "sparse.onnx",
        compare="sparsegpt",
    )


def magika_feeds(count: int = 32) -> list[Feed]:
    """Files of the standard library, as magika reads them: first and last 1024 bytes."""
    files = sorted(Path(json.__file__).parent.parent.glob("*.py"))[:count]
    rows = []
    for file in files:
        content = np.frombuffer(file.read_bytes().strip(), np.uint8).astype(np.int32)
        first, last = content[:1024], content[-1024:]
        row = np.full(2048, 256, np.int32)
        row[: len(first)], row[2048 - len(last) :] = first, last
        rows.append(row)
    return [{"bytes": np.stack(rows[i : i + 8])} for i in range(0, count, 8)]


def weights_of(path: Path | str) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def test_every_encoder_linear_is_2_4_along_its_inputs(
    sparse_minilm: PruneResult, minilm_model: Path
) -> None:
    weights = weights_of(sparse_minilm.output)
    dense = onnx.load(minilm_model).graph
    constants = {tensor.name for tensor in dense.initializer}
    linears = [n.input[1] for n in dense.node if n.op_type == "MatMul" and n.input[1] in constants]
    assert len(linears) == 36
    for name in linears:
        groups = weights[name].T.reshape(-1, 4)  # stored (in, out): inputs are axis 0
        assert (np.count_nonzero(groups, axis=1) <= 2).all(), name
    assert sparse_minilm.report.totals["sites"] == 36
    assert sparse_minilm.report.totals["sparsity"] == pytest.approx(0.5)


ONE_SHOT = {
    "sequential": "none",
    "target": "layer",
    "bias_compensation": 0.0,
    "random_tokens": 0.0,
}


def test_layer_errors_are_those_of_the_written_file(
    minilm_model: Path, minilm_feeds: list[Feed], tmp_path: Path
) -> None:
    """Independent reference: activations fetched by hand, float64, padding dropped by hand."""
    sparse_minilm = iobs_onnx.prune(
        minilm_model,
        calibration=minilm_feeds,
        sparsity="2:4",
        output=tmp_path / "one-shot.onnx",
        preset="fast",
        **ONE_SHOT,
    )
    held_out = {id(feed) for feed in minilm_feeds[1:2]}  # the second of every ten
    site = sparse_minilm.report.sites[4]
    model = onnx.load(minilm_model)
    activation = site.taps[0]
    model.graph.output.append(helper.make_empty_tensor_value_info(activation))
    session = ort.InferenceSession(model.SerializeToString())
    rows = []
    for feed in minilm_feeds:
        if id(feed) not in held_out:
            (values,) = session.run([activation], feed)
            rows.append(values[feed["attention_mask"] == 1])
    x = np.concatenate(rows).astype(np.float64)
    dense = weights_of(minilm_model)[site.initializer].astype(np.float64)
    sparse = weights_of(sparse_minilm.output)[site.initializer].astype(np.float64)
    error = np.square(x @ (sparse - dense)).sum() / np.square(x @ dense).sum()
    assert site.rows == len(x)
    assert site.layer_error == pytest.approx(error, rel=1e-4)


def test_iobs_beats_sparsegpt_on_every_site(sparse_minilm: PruneResult) -> None:
    ratios = [site.error_ratio for site in sparse_minilm.report.sites]
    assert max(ratios) < 0.8
    assert sparse_minilm.report.totals["error_ratio_geomean"] < 0.6


def test_longer_presets_find_better_supports(minilm_model: Path, minilm_feeds: list[Feed]) -> None:
    errors = [
        iobs_onnx.prune(
            minilm_model,
            calibration=minilm_feeds,
            sparsity="2:4",
            preset=preset,
            distill="none",  # of best, which would train what is kept
            include=["*layer.0.attention.output*"],
        ).report.totals["layer_error_geomean"]
        for preset in ("best", "balanced", "fast")
    ]
    assert errors == sorted(errors)


def test_nothing_else_in_the_file_changed(sparse_minilm: PruneResult, minilm_model: Path) -> None:
    pruned = {site.initializer for site in sparse_minilm.report.sites}
    assert all(site.bias_compensated for site in sparse_minilm.report.sites)
    pruned |= {site.name.replace(".weight", ".bias") for site in sparse_minilm.report.sites}
    before, after = onnx.load(minilm_model), onnx.load(sparse_minilm.output)
    for model in (before, after):
        for tensor in model.graph.initializer:
            if tensor.name in pruned:
                tensor.raw_data = b""
    assert [t.name for t in after.graph.initializer] == [t.name for t in before.graph.initializer]
    for mine, theirs in zip(after.graph.initializer, before.graph.initializer, strict=True):
        assert mine == theirs
    assert list(after.graph.node) == list(before.graph.node)
    assert list(after.opset_import) == list(before.opset_import)
    assert after.ir_version == before.ir_version
    assert {(p.key, p.value) for p in after.metadata_props} == {
        (p.key, p.value) for p in before.metadata_props
    }
    assert Path(sparse_minilm.output).stat().st_size <= minilm_model.stat().st_size * 1.01


def test_polygraphy_agrees_on_a_transformer(sparse_minilm: PruneResult) -> None:
    pruned = {site.initializer for site in sparse_minilm.report.sites}
    assert polygraphy_2_4(sparse_minilm.output) == pruned


def test_polygraphy_agrees_on_a_convolutional_model(magika_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "sparse.onnx"
    result = iobs_onnx.prune(
        magika_model, calibration=magika_feeds(), sparsity="2:4", output=output
    )
    ours = {site.initializer for site in result.report.sites}
    assert {site.op_type for site in result.report.sites} == {"Conv", "MatMul"}
    (declined,) = result.report.declined
    assert "257 inputs along the reduction axis are not a multiple of 4" in declined["reason"]
    assert polygraphy_2_4(output) == ours


@pytest.mark.parametrize("name", ["resnet20", "stories15M"])
def test_polygraphy_agrees_on_shared_models(name: str, shared: Path, tmp_path: Path) -> None:
    if name == "resnet20":
        images = np.load(shared / "data/cifar10/train_first_2000.npz")["x"][:64]
        mean, std = np.array((0.485, 0.456, 0.406)), np.array((0.229, 0.224, 0.225))
        pixels = ((images / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
        data: object = {"x": pixels}
    else:
        data = [{"input_ids": np.arange(1 + i, 65 + i)[None]} for i in range(4)]
    output = tmp_path / "sparse.onnx"
    result = iobs_onnx.prune(
        shared / "models" / f"{name}.onnx",
        calibration=data,
        sparsity="2:4",
        output=output,
        solver="magnitude",
    )
    sites = find_sites(load_model(output)).sites
    pruned = {site.initializer for site in result.report.sites}
    claims = {s.name: iobs_onnx.NM(2, 4) for s in sites if s.initializer in pruned}
    assert not check_pattern(load_model(output), sites, claims)
    assert polygraphy_2_4(output) == pruned


def polygraphy_2_4(path: Path | str) -> set[str]:
    """Names of the weights that Polygraphy finds 2:4 sparse."""
    from polygraphy.logger import G_LOGGER
    from polygraphy.tools.sparse import SparsityPruner

    # It overflows a float on purpose.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(over="ignore"):
        pruner = SparsityPruner(onnx.load(path))
        pruner.check()
    return set(pruner.sparse_tensors)


def test_two_runs_write_the_same_bytes(
    minilm_model: Path, minilm_feeds: list[Feed], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        iobs_onnx.prune(
            minilm_model,
            calibration=minilm_feeds,
            sparsity="2:4",
            output=tmp_path / name,
            include=["*layer.0*"],
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_unstructured_removes_the_fraction_of_every_site(
    minilm_model: Path, minilm_feeds: list[Feed]
) -> None:
    for solver in ("iobs", "sparsegpt", "wanda", "magnitude"):
        result = iobs_onnx.prune(
            minilm_model,
            calibration=minilm_feeds,
            sparsity=0.7,
            solver=solver,
            include=["*layer.0.attention*"],
        )
        assert len(result.report.sites) == 4
        for site in result.report.sites:
            assert site.sparsity == pytest.approx(0.7, abs=2e-3)
            assert 0 < site.layer_error < 1


def test_zero_sparsity_leaves_every_bit(minilm_model: Path, minilm_feeds: list[Feed]) -> None:
    result = iobs_onnx.prune(minilm_model, calibration=minilm_feeds, sparsity=0.0)
    dense = weights_of(minilm_model)
    for site in result.report.sites:
        array = result.model.graph.initializers[site.initializer].const_value.numpy()
        assert array.tobytes() == dense[site.initializer].tobytes()
        assert site.layer_error == 0.0
    assert all(output.relative_error == 0.0 for output in result.report.verification)


def test_padding_is_excluded_by_default_and_counts_when_asked(
    minilm_model: Path, minilm_feeds: list[Feed]
) -> None:
    tokens = sum(int(feed["attention_mask"].sum()) for i, feed in enumerate(minilm_feeds) if i != 1)
    places = sum(feed["attention_mask"].size for i, feed in enumerate(minilm_feeds) if i != 1)
    assert tokens < places
    for mask_padding, rows in ((True, tokens), (False, places)):
        result = iobs_onnx.prune(
            minilm_model,
            calibration=minilm_feeds,
            sparsity="2:4",
            solver="wanda",
            include=["*layer.0.attention.self.query*"],
            mask_padding=mask_padding,
            random_tokens=0.0,
        )
        assert [site.rows for site in result.report.sites] == [rows]
        assert result.report.calibration.padding_excluded is mask_padding


def linear_model(dtype: type = np.float32, features: int = 16) -> onnx.ModelProto:
    """x -> MatMul(w) -> Relu -> MatMul(w) with one shared weight, and a grouped Conv after it."""
    rng = np.random.default_rng(0)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    tensors = {
        "w": rng.normal(size=(features, features)).astype(dtype) / 4,
        "k": rng.normal(size=(8, features // 4, 3)).astype(dtype) / 4,
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["c"], "second"),
        helper.make_node("Transpose", ["c"], ["d"], perm=[0, 2, 1]),
        helper.make_node("Conv", ["d", "k"], ["y"], "conv", group=4, pads=[1, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", kind, ["n", 12, features])],
        [helper.make_tensor_value_info("y", kind, ["n", 8, 12])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_shared_weight_grouped_conv_and_half_precision(dtype: type) -> None:
    rng = np.random.default_rng(1)
    data = {"x": rng.normal(size=(40, 12, 16)).astype(dtype)}
    result = iobs_onnx.prune(
        linear_model(dtype), calibration=data, sparsity="2:4", compare="magnitude"
    )
    shared, conv = result.report.sites
    assert shared.nodes == ["first", "second"]
    assert len(shared.taps) == 2
    assert shared.rows == 2 * conv.rows == 2 * 36 * 12  # four samples are held out
    assert conv.groups == 4
    for site in (shared, conv):
        stored = result.model.graph.initializers[site.initializer].const_value.numpy()
        assert stored.dtype == dtype
        assert site.error_ratio < 1
    kernel = result.model.graph.initializers["k"].const_value.numpy()
    assert (np.count_nonzero(kernel, axis=1) <= 2).all()  # 4 input channels a group
    assert result.report.verification[0].cosine > 0.8


def test_inputs_are_not_changed() -> None:
    model = linear_model()
    before = model.SerializeToString()
    data = {"x": np.random.default_rng(1).normal(size=(20, 12, 16)).astype(np.float32)}
    copy = data["x"].copy()
    iobs_onnx.prune(model, calibration=data, sparsity="2:4")
    assert model.SerializeToString() == before
    np.testing.assert_array_equal(data["x"], copy)
    loaded = load_model(model)
    iobs_onnx.prune(loaded, calibration=data, sparsity="2:4")
    assert loaded.graph.initializers["w"].const_value.numpy().all()


def test_the_report_is_json_and_names_everything(
    sparse_minilm: PruneResult, tmp_path: Path
) -> None:
    path = sparse_minilm.report.save(tmp_path / "new" / "folder")
    report = json.loads(path.read_text())
    assert report["schema_version"] == 1
    assert set(report) == documented_fields("PruneReport")
    assert set(report["sites"][0]) == documented_fields("SiteReport")
    assert set(report["calibration"]) == documented_fields("CalibrationRecord")
    assert report["options"]["sparsity"] == "2:4"
    assert len(report["model"]["sha256"]) == len(report["output"]["sha256"]) == 64
    assert report["model"]["sha256"] != report["output"]["sha256"]
    assert report["runtime"]["providers"] == ["CPUExecutionProvider"]


def documented_fields(record: str) -> set[str]:
    """Field names in the table of docs/report.md under a record's heading."""
    page = Path(__file__).parents[2] / "docs" / "report.md"
    section = page.read_text().split(f"## `{record}`")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return {row.split("`")[1] for row in rows}


def test_progress_sees_every_batch_and_site() -> None:
    from collections import Counter
    from contextlib import contextmanager

    seen: Counter[str] = Counter()
    totals = {}

    class Counting(Progress):
        @contextmanager
        def stage(self, name, total):  # type: ignore[no-untyped-def]
            totals[name] = total
            yield lambda: seen.update([name])

    data = {"x": np.random.default_rng(1).normal(size=(40, 12, 16)).astype(np.float32)}
    iobs_onnx.prune(
        linear_model(), calibration=data, sparsity="2:4", batch_size=4, progress=Counting()
    )
    # Nine batches go through each of the segments, and two sites are solved.
    [total] = totals.values()
    assert seen == totals == {"prune": total}
    assert (total - 2) % 9 == 0


def failing_cases() -> list[tuple[dict, type, str]]:
    good = {"x": np.ones((4, 12, 16), np.float32)}
    bad = {"x": np.full((4, 12, 16), np.nan, np.float32)}
    return [
        ({"calibration": bad}, DataError, "'x'"),
        ({"calibration": {"z": good["x"]}}, DataError, "'z'"),
        ({"calibration": {"x": good["x"].astype(np.float64)}}, DataError, "'x'"),
        ({"calibration": {"x": good["x"][0]}}, DataError, "'x'"),
        ({"calibration": []}, DataError, "no feeds"),
        ({"sparsity": "4:2"}, OptionError, "0 < N <= M"),
        ({"sparsity": "2:5"}, ModelError, "not a multiple of 5"),
        ({"sparsity": 1.5}, OptionError, "must be in"),
        ({"solver": "iobz"}, OptionError, "'iobz' is unknown"),
        ({"include": ["nothing*"]}, OptionError, "matches no site"),
        ({"exclude": ["*"]}, ModelError, "excluded by --exclude"),
        ({"damping": -1.0}, OptionError, "damping"),
        ({"sampels": 3}, OptionError, "did you mean 'samples'"),
        ({"device": "cuda"}, DependencyError, "device cuda"),
    ]


@pytest.mark.parametrize(("change", "kind", "text"), failing_cases())
def test_bad_input_is_one_clear_error_and_no_file(
    change: dict, kind: type, text: str, tmp_path: Path
) -> None:
    import torch

    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    given = {"calibration": {"x": np.ones((4, 12, 16), np.float32)}, "sparsity": "2:4", **change}
    with pytest.raises(kind, match=text) as caught:
        iobs_onnx.prune(linear_model(), output=tmp_path / "out.onnx", **given)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_nan_weight_names_the_tensor() -> None:
    model = linear_model()
    broken = numpy_helper.to_array(model.graph.initializer[0]).copy()
    broken[0, 0] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(broken, "w"))
    data = {"x": np.ones((4, 12, 16), np.float32)}
    with pytest.raises(DataError, match=r"activation '\w+', batch 0: holds NaN"):
        iobs_onnx.prune(model, calibration=data, sparsity="2:4")


def test_inspect_needs_neither_torch_nor_onnxruntime() -> None:
    import subprocess

    code = (
        "import sys, iobs_onnx; iobs_onnx.inspect; import iobs_onnx.cli; "
        "print(sorted({'torch', 'onnxruntime', 'scipy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("constant", [True, False])
def test_a_bfloat16_model_on_the_cpu(constant: bool, tmp_path: Path) -> None:
    """ONNX Runtime has no bfloat16 there: float32 computes what the same numbers give in it."""
    rng = np.random.default_rng(7)
    arrays = [rng.standard_normal((16, 16)).astype(ml_dtypes.bfloat16) for _ in "wv"]
    feeds = [{"x": rng.standard_normal((64, 16)).astype(np.float32)} for _ in range(3)]
    found = []
    for dtype in (ml_dtypes.bfloat16, np.float32):
        elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        stored = [
            helper.make_tensor(name, elem, (16, 16), array.astype(dtype).tobytes(), raw=True)
            for name, array in zip("wv", arrays, strict=True)
        ]
        nodes = [
            *(helper.make_node("Constant", [], [t.name], value=t) for t in stored if constant),
            helper.make_node("Cast", ["x"], ["c"], to=elem),
            helper.make_node("MatMul", ["c", "w"], ["h"]),
            helper.make_node("Tanh", ["h"], ["t"]),
            helper.make_node("MatMul", ["t", "v"], ["z"]),
            helper.make_node("Cast", ["z"], ["y"], to=TensorProto.FLOAT),
        ]
        x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 16]) for n in "xy")
        graph = helper.make_graph(nodes, "g", [x], [y], [] if constant else stored)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        result = iobs_onnx.prune(
            proto,
            calibration=feeds,
            sparsity="2:4",
            output=tmp_path / "out.onnx",
            sequential="none",
            target="layer",
            provider="cpu",
        )
        slots = stored_slots(load_model(tmp_path / "out.onnx"))
        narrow = dtype == ml_dtypes.bfloat16
        assert result.report.runtime.get("bfloat16") == ("computed in float32" if narrow else None)
        assert any("bfloat16 was" in str(line) for line in render(result.report)) == narrow
        found.append([slots[name].tensor.numpy() for name in "wv"])
        assert [array.dtype for array in found[-1]] == [np.dtype(dtype)] * 2
        sites = find_sites(result.model).sites
        assert not check_pattern(result.model, sites, {site.name: NM(2, 4) for site in sites})
        assert result.report.verification[0].relative_error < 0.7
    for narrow, wide in zip(*found, strict=True):
        assert np.array_equal(narrow == 0, wide == 0)
        # Half of the last of 8 bits, and what float32 rounds before it.
        np.testing.assert_allclose(narrow.astype(np.float32), wide, rtol=2**-8, atol=1e-4)


def test_weights_and_biases_of_constant_nodes(tmp_path: Path) -> None:
    """Constants hold no external data, in which solved tensors wait: the result is the same."""
    rng = np.random.default_rng(4)
    shapes = {"w": (8, 8, 1), "b": (8,), "v": (8, 8, 1), "c": (8,)}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    stored = [numpy_helper.from_array(a.astype(np.float32), name) for name, a in arrays.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "v", "c"], ["y"]),
    ]
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in stored]
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8, 6])] for name in "xy"
    )
    feeds = [{"x": rng.standard_normal((16, 8, 6)).astype(np.float32)} for _ in range(4)]
    weights = []
    for held, first in ((stored, []), ([], constants)):
        graph = helper.make_graph([*first, *nodes], "g", inputs, outputs, held)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        output = tmp_path / "out.onnx"
        iobs_onnx.prune(proto, calibration=feeds, sparsity="2:4", output=output, provider="cpu")
        slots = stored_slots(load_model(output))
        weights.append({name: slots[name].tensor.numpy() for name in arrays})
    for name, array in arrays.items():
        assert not np.array_equal(weights[0][name], array.astype(np.float32))
        # Rounding of float32 times the condition of a Hessian that is damped by 1 %.
        np.testing.assert_allclose(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4)
