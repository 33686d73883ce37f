"""The parts of the benchmarks that are not measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import iobs_onnx

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.usefixtures("benchmarks")
def test_scale_writes_a_language_model_whose_linears_are_all_sites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import scale

    for name, value in (("HIDDEN", 32), ("FEED_FORWARD", 64), ("HEADS", 4), ("VOCABULARY", 50)):
        monkeypatch.setattr(scale, name, value)
    path = tmp_path / "dense.onnx"
    scale.write_model(path, layers=2)
    onnx.checker.check_model(str(path), full_check=True)
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 50 * 32
    assert path.with_suffix(".data").stat().st_size == 4 * weights
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids = np.zeros((1, scale.SEQUENCE), np.int64)
    ids[0, -1] = 1
    (logits,) = session.run(None, {"input_ids": ids})
    # The last token moves nothing before it: attention is causal.
    (same,) = session.run(None, {"input_ids": np.zeros_like(ids)})
    np.testing.assert_allclose(logits[0, :-1], same[0, :-1], atol=1e-5)
    assert np.abs(logits[0, -1] - same[0, -1]).max() > 1e-3
    assert len(iobs_onnx.inspect(path).sites) == 2 * 7


@pytest.mark.usefixtures("benchmarks")
def test_scale_measures_the_memory_of_the_child_alone() -> None:
    import scale

    hundred = "import time; x = bytearray(100_000_000); time.sleep(0.5)"
    measured = scale.run_measured([sys.executable, "-c", hundred])
    assert 100e6 < measured["own"] < 130e6
    assert measured["own"] <= measured["peak"]
    assert measured["seconds"] > 0.5
    with pytest.raises(SystemExit, match="exit code 3"):
        scale.run_measured([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.usefixtures("benchmarks")
def test_results_become_a_table_and_a_plot(tmp_path: Path) -> None:
    import quality_report

    def line(method: str, pattern: str, value: float, **more: object) -> str:
        return json.dumps(
            {
                **{"task": "toy", "title": "Toy, judged", "metric_formats": {"loss": ".1f"}},
                **{"falls": True, "method": method, "pattern": pattern, "preset": None},
                **{"count": 8, "metrics": {"loss": value}, **more},
            }
        )

    results = tmp_path / "results.jsonl"
    lines = [line("dense", "", 1.0, count=0), line("sparsegpt", "2:4", 3.0)]
    lines += [line("defaults", "2:4", 2.0, preset="balanced"), line("wanda", "2:4", 4.0)]
    lines += [line("defaults", "0.5", 1.5, preset="balanced", count=16)]
    results.write_text("\n".join(lines))
    page, short = tmp_path / "benchmarks-notebook.md", tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- model_quality: begin -->old<!-- model_quality: end -->\nafter\n")
    short.write_text("<!-- model_quality in short: begin --><!-- model_quality in short: end -->")
    quality_report.render(results, ["wanda", "sparsegpt", "defaults"], tmp_path)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("-->\nafter\n")
    assert "old" not in text
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert rows == [
        "| loss | 2:4 | 50% |",
        "|---|---|---|",
        "| dense | 1.0 | 1.0 |",
        "| wanda | 4.0 |  |",
        "| sparsegpt | 3.0 |  |",
        "| defaults | 2.0 |  |",
        "| defaults, 16 for calibration |  | 1.5 |",
    ]
    assert [row for row in short.read_text().splitlines() if row.startswith("|")] == [
        "| model | metric | pattern | dense | magnitude | wanda | sparsegpt | alps | defaults |",
        "|---|---|---|---|---|---|---|---|---|",
        "| Toy | loss | 2:4 | 1.0 |  | 4.0 | 3.0 |  | **2.0** |",
        "| Toy | loss | 50% | 1.0 |  |  |  |  |  |",
    ]
    assert (tmp_path / "img/quality-toy.png").stat().st_size > 10_000
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="lacks the marks"):
        quality_report.render(results, ["wanda", "sparsegpt", "defaults"], tmp_path)


@pytest.mark.usefixtures("benchmarks")
def test_weights_are_rounded_to_the_nearest_of_each_outputs_grid(tmp_path: Path) -> None:
    import quantization

    weight = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)  # (in, out)
    weight[:, 2] = 0
    weight[::2] = 0
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "toy",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 8])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 5])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset), tmp_path / "sparse.onnx")
    quantization.round_to_nearest(tmp_path / "sparse.onnx", tmp_path / "rounded.onnx")
    (tensor,) = onnx.load(tmp_path / "rounded.onnx").graph.initializer
    rounded = onnx.numpy_helper.to_array(tensor)
    for before, after in zip(weight.T, rounded.T, strict=True):
        step = np.abs(before).max() / 127
        assert np.abs(after - before).max() <= step * 0.5001
        assert (after[before == 0] == 0).all()
        if step:
            assert np.allclose(after / step, (after / step).round(), atol=1e-3)


@pytest.mark.usefixtures("benchmarks")
def test_words_are_drawn_and_the_best_path_is_read(tmp_path: Path) -> None:
    import odd_models
    from PIL import Image

    path = [0, 3, 3, 0, 3, 5, 5, 0]  # doubles without a blank between them are one
    assert odd_models.reading(np.eye(6)[path][:, None]) == [3, 3, 5]
    rng = np.random.default_rng(0)
    drawn = odd_models.word("Wide", rng)
    assert drawn.shape == (1, 1, 64, 160)
    assert drawn.min() < -0.5 < 0.5 < drawn.max()
    Image.new("RGB", (300, 200), (90, 90, 90)).save(tmp_path / "grey.png")
    photograph = odd_models.photograph(tmp_path / "grey.png", 64, rng)
    assert photograph.shape == (1, 3, 64, 64)
    assert photograph.std() > 0.1


@pytest.mark.usefixtures("benchmarks")
def test_what_proves_cuda_tries_itself_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import prove_cuda
    import scale

    for name in ("HIDDEN", "FEED_FORWARD", "HEADS", "VOCABULARY", "SEQUENCE"):
        monkeypatch.setattr(scale, name, getattr(scale, name))  # put back afterwards
    here = ["--provider", "cpu", "--device", "cpu", "--quick"]
    names = ("dlpack", "gram", "llama_block", "tiers", "wide_solve", "out_of_memory")
    assert prove_cuda.main([*here, "--checks", *names]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["check"] for line in lines] == list(names)
    assert [line["ok"] for line in lines] == [None, True, True, True, True, None]
    assert lines[2]["sites"] == 7

    def broken(_: object) -> dict[str, object]:
        raise RuntimeError("CUDA error: device-side assert")

    monkeypatch.setitem(prove_cuda.CHECKS, "gram", broken)
    assert prove_cuda.main([*here, "--checks", "gram", "dlpack"]) == 1
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["ok"], first["error"]) == (False, "RuntimeError: CUDA error: device-side assert")
    assert second["check"] == "dlpack"  # the others run all the same
