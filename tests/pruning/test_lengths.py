"""Models whose lengths follow from values, as predicted durations do in text to speech."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import iobs_onnx
from iobs_onnx.cli import main
from iobs_onnx.layer import solve_layer

WIDTH, FEEDS = 16, {"feeds": 24, "judging": 12}
# The durations decide how many frames there are; these read frames.
BEFORE, AFTER = ("first", "durations", "side"), ("up", "down", "last")


def speech(folder: Path, *, sharp: float) -> Path:
    """Return a model that repeats each token as often as it predicts, 1 to 4 times.

    `sharp` says how much the durations differ: with 0 every token lasts as long.
    """
    draw = np.random.default_rng(5)
    shapes = {name: (WIDTH, WIDTH) for name in ("first", "side", "up", "down", "last")}
    shapes["durations"] = (WIDTH, 1)
    arrays = {k: draw.normal(size=s).astype("f") / WIDTH**0.5 for k, s in shapes.items()}
    arrays["durations"] *= sharp
    arrays |= {"three": np.float32(3), "one": np.float32(1), "axis": np.array([1])}
    arrays |= {"zero": np.int64(0), "step": np.int64(1), "down.bias": np.zeros(WIDTH, "f")}

    def node(op: str, given: str, made: str, **more: object) -> onnx.NodeProto:
        return helper.make_node(op, given.split(), [made], name=f"{op}.{made}", **more)

    nodes = [
        node("MatMul", "x first", "first.out"),
        node("Relu", "first.out", "tokens"),
        node("MatMul", "tokens side", "states"),
        node("MatMul", "tokens durations", "logits"),
        node("Sigmoid", "logits", "share"),
        node("Mul", "share three", "scaled"),
        node("Round", "scaled", "whole"),
        node("Add", "whole one", "lasting"),
        node("Squeeze", "lasting axis", "lasts"),
        node("Cast", "lasts", "counts", to=TensorProto.INT64),
        node("CumSum", "counts zero", "ends"),
        node("ReduceSum", "counts", "total", keepdims=0),
        node("Range", "zero total step", "frames"),
        node("Unsqueeze", "frames axis", "columns"),
        node("GreaterOrEqual", "columns ends", "past"),
        node("Cast", "past", "passed", to=TensorProto.INT64),
        node("ReduceSum", "passed axis", "places", keepdims=0),
        node("Gather", "tokens places", "spread"),
        node("MatMul", "spread up", "up.out"),
        node("Relu", "up.out", "up.relu"),
        node("MatMul", "up.relu down", "down.product"),
        node("Add", "down.product down.bias", "down.out"),
        node("Add", "spread down.out", "block"),
        node("MatMul", "block last", "waveform"),
    ]
    kind = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "speech",
        [helper.make_tensor_value_info("x", kind, ["t", WIDTH])],
        [
            helper.make_tensor_value_info("waveform", kind, ["frames", WIDTH]),
            helper.make_tensor_value_info("states", kind, ["t", WIDTH]),
        ],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "speech.onnx")
    mixing = draw.normal(size=(WIDTH, WIDTH))
    for name, count in FEEDS.items():
        (folder / name).mkdir()
        for i in range(count):
            rows = draw.normal(size=(4 + i % 5, WIDTH)) @ mixing
            np.savez(folder / name / f"{i:02d}.npz", x=rows.astype("f"))
    return folder / "speech.onnx"


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def values(path: Path, name: str, feeds: Path) -> list[np.ndarray]:
    """Return an activation for every feed of a folder, float64."""
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.append(helper.make_empty_tensor_value_info(name))
    session = ort.InferenceSession(model.SerializeToString())
    return [
        session.run([name], dict(np.load(f)))[0].astype(np.float64) for f in sorted(feeds.iterdir())
    ]


def prune(model: Path, output: Path, *more: str) -> int:
    data = [str(model.parent / name) for name in FEEDS]
    command = ["prune", str(model), "--calibration", data[0], "--holdout", data[1]]
    command += ["--sparsity", "2:4", "--output", str(output), "--report-dir", str(output.parent)]
    return main([*command, *more])


def by_tensor(report: dict) -> dict[str, dict]:
    return {site["initializer"]: site for site in report["sites"]}


def test_what_is_out_of_step_aims_at_its_own_layer_and_the_report_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = speech(tmp_path, sharp=3.0), tmp_path / "out" / "sparse.onnx"
    assert prune(model, output, "--learning-rate", "1", "--bias-compensation", "0") == 0
    report = json.loads((output.parent / "report.json").read_text())
    sites = by_tensor(report)
    assert sites.keys() == {*BEFORE, *AFTER}

    calibrating, judging = (tmp_path / name for name in FEEDS)
    apart = {tap for name in AFTER for tap in sites[name]["taps"]}
    assert set(report["calibration"]["out_of_step"]) == apart
    (note,) = [note for note in report["calibration"]["notes"] if "target layer" in note]
    assert "3 of 6 sites" in note
    assert all(sites[name]["name"] in note for name in AFTER)
    assert not any(sites[name]["name"] in note for name in BEFORE)

    # What was held out, by hand.
    told = {output["name"]: output for output in report["verification"]}
    pairs = list(zip(*(values(p, "waveform", judging) for p in (model, output)), strict=True))
    agree = [(a, b) for a, b in pairs if a.shape == b.shape]
    found = told["waveform"]
    assert (found["feeds"], found["apart"]) == (FEEDS["judging"], len(pairs) - len(agree))
    assert 0 < found["apart"] < found["feeds"]
    a, b = (np.concatenate(each) for each in zip(*agree, strict=True))
    error = np.linalg.norm(b - a) / np.linalg.norm(a)
    assert found["relative_error"] == pytest.approx(error, rel=1e-4)
    assert "its length depends on the values" in found["note"]
    a, b = (np.concatenate(values(p, "states", judging)) for p in (model, output))
    assert told["states"]["relative_error"] == pytest.approx(
        np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-4
    )
    assert told["states"]["note"] is None
    printed = " ".join(capsys.readouterr().out.split())
    assert f"output waveform: {found['note']}" in printed

    # A site out of step, by hand: the layer's own target on what the pruned model feeds it.
    rows = np.concatenate(values(output, "up.relu", calibrating))
    dense = weights_of(model)["down"].T.astype(np.float64)
    expected = solve_layer(dense, rows.T @ rows / len(rows), sparsity="2:4").weight
    stored = weights_of(output)["down"].T
    np.testing.assert_array_equal(stored != 0, expected != 0)
    np.testing.assert_allclose(stored, expected, rtol=1e-3, atol=1e-4)


def test_what_lengths_follow_from_can_be_left_dense(tmp_path: Path) -> None:
    """The note names it; without it all aim at the dense model."""
    model, output = speech(tmp_path, sharp=3.0), tmp_path / "out" / "sparse.onnx"
    assert prune(model, output) == 0
    report = json.loads((output.parent / "report.json").read_text())
    (note,) = [n for n in report["calibration"]["notes"] if "these lengths follow from" in n]
    assert "from 2 of the pruned sites" in note
    names = {by_tensor(report)[weight]["name"] for weight in ("first", "durations")}
    told = shlex.split(note[note.index("--exclude") :])
    assert told[::2] == ["--exclude"] * 2
    assert set(told[1::2]) == names
    assert prune(model, output, *told) == 0
    report = json.loads((output.parent / "report.json").read_text())
    assert by_tensor(report).keys() == {"side", *AFTER}
    assert report["calibration"]["out_of_step"] == []
    assert all(told["apart"] == 0 for told in report["verification"])


def test_sites_in_step_keep_what_they_have_without_the_others(tmp_path: Path) -> None:
    """The same bytes as in a model that ends where lengths begin to differ."""
    model = speech(tmp_path, sharp=3.0)
    whole, part = tmp_path / "whole.onnx", tmp_path / "part.onnx"
    cut = onnx.load(model)
    del cut.graph.node[4:]
    cut.graph.output[0].CopyFrom(helper.make_empty_tensor_value_info("logits"))
    cut.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(cut, tmp_path / "cut.onnx")
    assert prune(model, whole) == 0
    assert prune(tmp_path / "cut.onnx", part) == 0
    ours, theirs = weights_of(whole), weights_of(part)
    for name in BEFORE:
        assert ours[name].tobytes() == theirs[name].tobytes()


def test_lengths_that_agree_are_in_step(tmp_path: Path) -> None:
    model, output = speech(tmp_path, sharp=0.0), tmp_path / "sparse.onnx"
    assert prune(model, output, "--exclude", "durations") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["calibration"]["out_of_step"] == []
    assert all(out["apart"] == 0 and out["note"] is None for out in report["verification"])
    assert not any("target layer" in note for note in report["calibration"]["notes"])


@pytest.mark.parametrize("gate", ["--max-output-error", "--budget-error"])
def test_a_feed_whose_shapes_differ_counts_against_a_bound(
    tmp_path: Path, gate: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = speech(tmp_path, sharp=3.0), tmp_path / "sparse.onnx"
    code = prune(model, output, gate, "0.05")
    if gate == "--max-output-error":
        assert code == 4
        error = capsys.readouterr().err
        assert "output 'waveform'" in error
        assert "a feed left out counts as 1" in error
        assert not output.exists()
    else:  # sites go back to dense until it holds
        assert code == 0
        (told, _) = json.loads((tmp_path / "report.json").read_text())["verification"]
        assert told["apart"] == 0


def test_rounds_remember_no_drift_of_what_is_out_of_step(tmp_path: Path) -> None:
    model, output = speech(tmp_path, sharp=3.0), tmp_path / "sparse.onnx"
    assert prune(model, output, "--rounds", "2", "--forgetting-factor", "0.5") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(item["error"] is not None for item in report["rounds"])
    assert report["calibration"]["out_of_step"]


@pytest.mark.parametrize("how", ["model", "blocks", "both"])
def test_distillation_leaves_out_what_may_differ_in_length(tmp_path: Path, how: str) -> None:
    model, output = speech(tmp_path, sharp=3.0), tmp_path / "sparse.onnx"
    assert prune(model, output, "--distill", how, "--distill-steps", "20") == 0
    told = json.loads((tmp_path / "report.json").read_text())["distillation"]
    note = "output 'waveform' is not matched: its length depends on the values"
    for part in (told if how != "blocks" else None, told["blocks"]):
        if part is not None:
            assert note in part["notes"]
            assert part["steps"] > 0
    if how != "blocks":
        assert told["losses"].keys() == {"states"}
    else:
        matched = {name for block in told["blocks"]["each"] for name in block["outputs"]}
        assert not matched & {"waveform", "spread", "block", "up.out", "up.relu"}


@pytest.mark.parametrize("how", ["model", "blocks"])
def test_distillation_with_nothing_else_to_match_is_refused_before_the_work(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = speech(tmp_path, sharp=3.0)
    alone = onnx.load(model)
    del alone.graph.output[1], alone.graph.node[2]
    onnx.save(alone, model)

    def walk(*_: object) -> None:
        pytest.fail("the model was walked")

    monkeypatch.setattr("iobs_onnx.pruning.rounds.Rounds.walk", walk)
    assert prune(model, tmp_path / "sparse.onnx", "--distill", how) == 2
    error = capsys.readouterr().err
    assert "output 'waveform' cannot be matched" in error
    assert "leave out --distill" in error


def test_verify_compares_what_can_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = speech(tmp_path, sharp=3.0), tmp_path / "sparse.onnx"
    assert prune(model, output, "--quiet") == 0
    capsys.readouterr()
    data = ["--dense", str(model), "--data", str(tmp_path / "feeds")]
    assert main(["verify", str(output), *data]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("output states: relative error") for line in lines)
    (waveform,) = [line for line in lines if line.startswith("output waveform")]
    assert f"of {FEEDS['feeds']} feeds" in waveform
    found = iobs_onnx.verify(output, dense=model, data=tmp_path / "feeds")
    assert next(out for out in found.outputs if out["name"] == "waveform")["apart"] > 0
