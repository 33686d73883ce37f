"""Damaged work folders: each damage is noticed, or the written bytes are as without it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from iobs_onnx.cli import main

WIDTH = 8
ROUNDS = ("--rounds", "2", "--forgetting-factor", "0.5")
TRAINED = ("--distill", "both", "--distill-steps", "6", "--quantize", "int8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three linears pruned in two rounds; `whole` and `half` are its work folders at two times."""
    folder = tmp_path_factory.mktemp("run")
    draw = np.random.default_rng(5)
    nodes, weights, value = [], [], "x"
    for name in ("a", "b", "c"):
        array = draw.normal(size=(WIDTH, WIDTH)).astype(np.float32)
        weights.append(numpy_helper.from_array(array, name))
        nodes.append(helper.make_node("MatMul", [value, name], [f"{name}.out"], name=name))
        nodes.append(helper.make_node("Relu", [f"{name}.out"], [f"{name}.relu"]))
        value = f"{name}.relu"
    infos = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", WIDTH])
        for name in ("x", value)
    ]
    graph = helper.make_graph(nodes, "three", infos[:1], infos[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    rows = draw.normal(size=(96, WIDTH)) @ draw.normal(size=(WIDTH, WIDTH))
    np.savez(folder / "rows.npz", x=rows.astype(np.float32))
    assert prune(folder, folder / "whole", folder / "whole.onnx") == 0
    shutil.copytree(folder / "whole", folder / "half")
    for file in (*folder.glob("half/round-2-segment-0001*"), *folder.glob("half/round-2-v*")):
        file.unlink()
    return folder


def prune(folder: Path, work: Path, output: Path, options: Sequence[str] = ROUNDS) -> int:
    command = ["prune", str(folder / "model.onnx"), "--calibration", str(folder / "rows.npz")]
    command += ["--sparsity", "2:4", "--preset", "fast", "--quiet", *options]
    return main([*command, "--work-dir", str(work), "--output", str(output)])


@pytest.fixture(scope="module")
def trained(run: Path) -> Path:
    """The same model, distilled and rounded to integers; its work folders lie below this one."""
    folder = run / "trained"
    folder.mkdir()
    for name in ("model.onnx", "rows.npz"):
        shutil.copy(run / name, folder)
    assert prune(folder, folder / "whole", folder / "whole.onnx", TRAINED) == 0
    shutil.copytree(folder / "whole", folder / "half")
    for file in (*folder.glob("half/model-distil.*"), *folder.glob("half/round-2-*")):
        file.unlink()
    return folder


def damage(work: Path, draw: np.random.Generator) -> str:
    """Damage a file, or two, as a disk, a copy that broke off or a person may; say how."""
    files = sorted(work.iterdir())
    file = files[draw.integers(len(files))]
    content = bytearray(file.read_bytes())
    kind = ("flip", "flip", "cut", "zero", "delete", "append", "swap")[draw.integers(7)]
    if kind == "flip":
        for _ in range(draw.integers(1, 4)):
            content[draw.integers(len(content))] ^= 1 << int(draw.integers(8))
    elif kind == "cut":
        del content[draw.integers(len(content)) :]
    elif kind == "zero":
        content = bytearray(len(content))
    elif kind == "append":
        content += bytes(draw.integers(256, size=draw.integers(1, 9)).tolist())
    elif kind == "swap":
        others = [other for other in files if other.suffix == file.suffix]
        other = others[draw.integers(len(others))]
        content, theirs = bytearray(other.read_bytes()), bytes(content)
        other.write_bytes(theirs)
    file.write_bytes(content)
    if kind == "delete":
        file.unlink()
    return f"{kind} {file.name}"


def hold(
    run: Path,
    options: Sequence[str],
    numbers: range,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """See that each damage is noticed, or the written bytes are as without it."""
    right, codes = (run / "whole.onnx").read_bytes(), []
    for number in numbers:
        draw = np.random.default_rng(number)
        work, output = folder / str(number), folder / "out.onnx"
        shutil.copytree(run / ("whole", "half")[number % 2], work)
        what = damage(work, draw)
        codes.append(prune(run, work, output, options))
        said = capsys.readouterr().err
        assert codes[-1] in (0, 2), (number, what, said)
        if codes[-1] == 2:
            assert all(text in said for text in (str(work), "; delete ")), (what, said)
            assert said.count("\n") == 1, (what, said)
            assert not output.exists()
        else:
            assert output.read_bytes() == right, (number, what)
            output.unlink()
    assert 0.2 < np.mean(np.array(codes) == 2) < 0.95  # both happen


@pytest.mark.parametrize(
    "numbers", [range(30), pytest.param(range(30, 230), marks=pytest.mark.slow)]
)
def test_random_damage_is_noticed_or_harmless(
    run: Path, tmp_path: Path, numbers: range, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(run, ROUNDS, numbers, tmp_path, capsys)


@pytest.mark.slow
def test_random_damage_of_what_was_trained(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hold(trained, TRAINED, range(1000, 1100), tmp_path, capsys)


@pytest.mark.parametrize("kind", ["solve.data", "sums.data", "solve.json", "verdict.json"])
def test_what_is_damaged_is_named_and_deleting_it_mends_the_folder(
    run: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    work, output = tmp_path / "work", tmp_path / "out.onnx"
    shutil.copytree(run / "whole", work)
    file = sorted(work.glob(f"round-1-*{kind}"))[-1]
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)) if file.suffix == ".data" else content[:-20])
    assert prune(run, work, output) == 2
    said = capsys.readouterr().err
    assert f"{file.name} is not what was written" in said
    assert not output.exists()
    record = file.with_suffix(".json")
    assert record.name in said
    record.unlink()
    assert prune(run, work, output) == 0
    assert output.read_bytes() == (run / "whole.onnx").read_bytes()


def test_a_folder_without_its_run_is_not_taken_for_that_of_another(
    run: Path, tmp_path: Path
) -> None:
    work, output = tmp_path / "work", tmp_path / "out.onnx"
    shutil.copytree(run / "whole", work)
    (work / "run.json").unlink()
    options = ["--sparsity", "1:4", "--preset", "fast", "--rounds", "2"]
    command = ["prune", str(run / "model.onnx"), "--calibration", str(run / "rows.npz")]
    command += [*options, "--forgetting-factor", "0.5", "--quiet"]
    assert main([*command, "--work-dir", str(work), "--output", str(output)]) == 0
    other = tmp_path / "other.onnx"
    assert main([*command, "--output", str(other)]) == 0
    assert output.read_bytes() == other.read_bytes()


def test_data_and_folder_reach_the_disk_before_the_record_counts(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def note_replace(source: Path, place: Path) -> None:
        events.append(f"place {Path(place).name}")
        replace(source, place)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    assert prune(run, tmp_path / "work", tmp_path / "out.onnx") == 0
    name = "round-1-segment-0000-solve"
    start = events.index(f"{name}.data")
    assert events[start : start + 6] == [
        f"{name}.data",
        f"place {name}.data",
        "work",
        f"{name}.json",
        f"place {name}.json",
        "work",
    ]
