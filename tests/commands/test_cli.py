"""The command line, as other tools call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from iobs_onnx.cli import main


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Two linears `(16, 16)` with a Relu between them, and feeds for it in `data.npz`."""
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "down"], ["y"], transB=1),
    ]
    shape = ["n", 16]
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(rng.normal(size=(16, 16)).astype(np.float32) / 4, name)
            for name in ("up", "down")
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "toy.onnx")
    np.savez(tmp_path / "data.npz", x=rng.normal(size=(64, 16)).astype(np.float32))
    return tmp_path


def prune(folder: Path, *more: str) -> int:
    return main(
        [
            *("prune", str(folder / "toy.onnx"), "--calibration", str(folder / "data.npz")),
            *("--sparsity", "2:4", "--output", str(folder / "out.onnx")),
            *more,
        ]
    )


def test_prune_writes_model_and_report_and_prints_a_table(toy: Path, capsys) -> None:
    assert prune(toy, "--report-dir", str(toy / "report"), "--compare", "sparsegpt") == 0
    printed = capsys.readouterr().out
    for text in ("2 sites pruned to 2:4", "up", "down", "÷ sparsegpt", "cosine", "report.json"):
        assert text in printed
    assert "━━━" in printed
    assert "\x1b" not in printed  # no colours, no bars: this is not a terminal
    report = json.loads((toy / "report" / "report.json").read_text())
    assert [site["name"] for site in report["sites"]] == ["up", "down"]
    assert main(["verify", str(toy / "out.onnx"), "--sparsity", "2:4"]) == 0


def test_quiet_prints_nothing(toy: Path, capsys) -> None:
    assert prune(toy, "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    assert (toy / "out.onnx").is_file()


def test_flags_override_the_toml_file(toy: Path) -> None:
    config = toy / "prune.toml"
    config.write_text('sparsity = "1:4"\nsolver = "wanda"\nbatch-size = 8\nexclude = ["down"]\n')
    assert prune(toy, "--config", str(config), "--report-dir", str(toy)) == 0
    options = json.loads((toy / "report.json").read_text())["options"]
    assert options["sparsity"] == "2:4"  # the flag
    assert (options["solver"], options["batch_size"], options["exclude"]) == ("wanda", 8, ["down"])


def test_everything_may_stand_in_the_toml_file(toy: Path, monkeypatch) -> None:
    monkeypatch.chdir(toy)
    Path("prune.toml").write_text(
        'calibration = "data.npz"\noutput = "out.onnx"\nreport_dir = "report"\nsparsity = 0.5\n'
    )
    assert main(["prune", "toy.onnx", "--config", "prune.toml", "--quiet"]) == 0
    assert json.loads(Path("report/report.json").read_text())["totals"]["zeros"] == 256


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--config", "absent.toml"], "absent.toml"),
        (["--solver-typo"], None),
        (["--samples", "0"], "samples 0"),
        (["--include", "zz*"], "'zz*' matches no site"),
        (["--calibration", "absent.npz"], "absent.npz"),
        (["--calibration", "nomodule:feeds"], "nomodule"),
        (["--sparsity", "2:4:1"], "2:4:1"),
        (["--provider", "cuda"], "provider cuda"),
        (["--output", "/dev/null/out.onnx"], "folder /dev/null cannot be made"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    toy: Path, flags: list[str], text: str | None, capsys
) -> None:
    before = sorted(toy.iterdir())
    if text is None:
        with pytest.raises(SystemExit, match="2"):
            prune(toy, *flags)
        return
    assert prune(toy, *flags) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.startswith("iobs-onnx: error: ")
    assert error.count("\n") == 1
    assert sorted(toy.iterdir()) == before


@pytest.mark.parametrize("key", ["sparsty = 1", "[table]\nx = 1", 'samples = "all"', "not toml ["])
def test_bad_toml_is_refused(toy: Path, key: str, capsys) -> None:
    (toy / "bad.toml").write_text(key)
    assert prune(toy, "--config", str(toy / "bad.toml")) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_debug_shows_the_traceback(toy: Path, capsys) -> None:
    assert prune(toy, "--samples", "0", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_missing_required_option_names_it(toy: Path, capsys) -> None:
    assert main(["prune", str(toy / "toy.onnx"), "--sparsity", "2:4"]) == 2
    assert "--output is missing" in capsys.readouterr().err
    command = ["prune", str(toy / "toy.onnx"), "--sparsity", "2:4", "--output", "out.onnx"]
    assert main(command) == 2
    assert "--calibration is missing" in capsys.readouterr().err


def test_output_is_checked_before_the_data_are_read(toy: Path, capsys) -> None:
    assert prune(toy, "--output", "/dev/null/out.onnx", "--calibration", "absent.npz") == 2
    assert "/dev/null/out.onnx" in capsys.readouterr().err
    assert prune(toy, "--output", str(toy), "--calibration", "absent.npz") == 2
    assert f"output {toy}/toy.onnx: would overwrite the model" in capsys.readouterr().err


def test_the_output_s_folder_is_made_and_goes_where_nothing_is_written(toy: Path) -> None:
    output = toy / "new" / "folder" / "out.onnx"
    assert prune(toy, "--output", str(output), "--samples", "0", "--quiet") == 2
    assert prune(toy, "--output", str(output), "--max-output-error", "0", "--quiet") == 4
    assert not (toy / "new").exists()
    assert prune(toy, "--output", str(output), "--quiet") == 0
    assert [path.name for path in output.parent.iterdir()] == ["out.onnx"]


def test_report_dir_is_checked_before_anything_is_written(toy: Path, capsys) -> None:
    (toy / "taken").touch()
    (toy / "odd" / "report.json").mkdir(parents=True)
    for folder in ("taken", "taken/deeper", "odd"):
        assert prune(toy, "--report-dir", str(toy / folder)) == 2
        assert f"report_dir {toy / folder}: " in capsys.readouterr().err
        assert not (toy / "out.onnx").exists()


def test_forms_and_sizes_are_told(toy: Path, capsys) -> None:
    assert prune(toy, "--emit", "sparse-initializer", "--report-dir", str(toy)) == 0
    output = json.loads((toy / "report.json").read_text())["output"]
    assert output["bytes"] == (toy / "out.onnx").stat().st_size
    assert (output["form"], output["refused"]) == ("sparse-initializer", None)
    assert f"written as sparse-initializer: {output['bytes']:,} bytes" in capsys.readouterr().out


def test_output_must_not_be_the_input(toy: Path, capsys) -> None:
    before = (toy / "toy.onnx").read_bytes()
    assert prune(toy, "--output", str(toy / "toy.onnx")) == 2
    assert (toy / "toy.onnx").read_bytes() == before


def test_inspect_lists_sites_taps_and_rules(toy: Path, capsys) -> None:
    assert main(["inspect", str(toy / "toy.onnx"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [site["axis"] for site in found["sites"]] == [0, 1]
    assert [site["taps"] for site in found["sites"]] == [["x"], ["b"]]
    assert all(site["eligible_2_4"] for site in found["sites"])
    assert found["declined"] == []
    assert main(["inspect", str(toy / "toy.onnx")]) == 0
    assert "2 sites, 2 taps" in capsys.readouterr().out


def test_inspect_shows_the_segments(toy: Path, capsys) -> None:
    command = ["inspect", str(toy / "toy.onnx"), "--segments"]
    assert main([*command, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)  # the second site reads the first one
    assert (first["sites"], second["sites"]) == (["up"], ["down"])
    assert first["inputs"] == ["x"]
    assert second["inputs"] == first["outputs"]
    assert main([*command, "--json", "--sequential", "none"]) == 0
    (whole,) = json.loads(capsys.readouterr().out)
    assert whole["sites"] == ["up", "down"]
    assert whole["weight_bytes"] == first["weight_bytes"] + second["weight_bytes"]
    assert main([*command, "--memory-budget", "1KB", "--sequential", "none"]) == 0
    assert "2 segments" in capsys.readouterr().out
    assert main([*command, "--memory-budget", "much"]) == 2


def test_verify_fails_where_the_pattern_does_not_hold(toy: Path, capsys) -> None:
    assert main(["verify", str(toy / "toy.onnx"), "--sparsity", "2:4"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED up: tensor 'up' is not 2:4" in printed
    assert main(["verify", str(toy / "toy.onnx"), "--sparsity", "2:4", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert not result["ok"]
    assert len(result["failures"]) == 2
    assert main(["verify", str(toy / "toy.onnx")]) == 0  # nothing is claimed


def test_verify_compares_outputs_with_the_dense_model(toy: Path, capsys) -> None:
    prune(toy, "--quiet", "--exclude", "down")
    command = ["verify", str(toy / "out.onnx"), "--sparsity", "2:4", "--include", "up", "--json"]
    command += ["--dense", str(toy / "toy.onnx"), "--data", str(toy / "data.npz")]
    assert main(command) == 0
    (output,) = json.loads(capsys.readouterr().out)["outputs"]
    # Independent reference.
    import onnxruntime as ort

    feed = dict(np.load(toy / "data.npz"))
    runs = [
        ort.InferenceSession(toy / name).run(None, feed)[0].astype(float)
        for name in ("toy.onnx", "out.onnx")
    ]
    expected = np.linalg.norm(runs[1] - runs[0]) / np.linalg.norm(runs[0])
    assert output["relative_error"] == pytest.approx(expected, rel=1e-5)
    assert main(["verify", str(toy / "out.onnx"), "--sparsity", "2:4"]) == 1  # down is dense
    assert main(["verify", str(toy / "out.onnx"), "--dense", str(toy / "toy.onnx")]) == 2


def test_verify_fails_on_outputs_that_are_not_finite(toy: Path, capsys) -> None:
    model = onnx.load(toy / "toy.onnx")
    from onnx import numpy_helper

    huge = np.full((16, 16), 3e38, np.float32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(huge, "up"))
    onnx.save(model, toy / "huge.onnx")
    command = ["verify", str(toy / "huge.onnx"), "--data", str(toy / "data.npz")]
    assert main(command) == 1
    assert "output 'y' is not finite" in capsys.readouterr().out


def test_it_runs_as_a_module_and_shows_bars_on_a_terminal(toy: Path) -> None:
    import pty

    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "iobs_onnx", "prune", "toy.onnx", "--calibration", "data.npz"]
    command += ["--sparsity", "2:4", "--output", "out.onnx"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(command, cwd=toy, stdout=follower, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(leader)
    assert process.wait() == 0
    assert b"prune" in shown


def test_help_names_every_option(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["prune", "--help"])
    shown = capsys.readouterr().out
    for flag in (
        *("--calibration", "--sparsity", "--output", "--report-dir", "--solver", "--samples"),
        *("--batch-size", "--include", "--exclude", "--damping", "--provider", "--device"),
        *("--seed", "--config", "--quiet", "--no-mask-padding", "--compare", "--debug"),
    ):
        assert flag in shown


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["inspect", "--json"]])
def test_what_runs_no_model_starts_lightly(toy: Path, arguments: list[str]) -> None:
    command = [*arguments, str(toy / "toy.onnx")] if arguments[0] == "inspect" else arguments
    heavy = {"torch", "onnxruntime", "transformers", "scipy", "rich", "matplotlib", "jinja2"}
    code = (
        f"import sys, contextlib\nfrom iobs_onnx.cli import main\n"
        f"with contextlib.suppress(SystemExit):\n    main({command!r})\n"
        f"print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_preset_belongs_to_iobs(toy: Path, capsys) -> None:
    assert prune(toy, "--preset", "fast", "--report-dir", str(toy)) == 0
    assert json.loads((toy / "report.json").read_text())["options"]["preset"] == "fast"
    assert prune(toy, "--preset", "fast", "--solver", "wanda") == 2
    assert "belongs to solver iobs" in capsys.readouterr().err


def test_a_run_that_goes_on_behind_its_last_segment_ends_as_any_other(toy: Path, capsys) -> None:
    """It solves nothing, as its driver was killed when it had only to write."""
    options = ("--work-dir", str(toy / "work"), "--report-dir", str(toy))
    assert prune(toy, *options) == 0
    assert prune(toy, *options) == 0, capsys.readouterr().err
    assert json.loads((toy / "report.json").read_text())["seconds"]["solve"] == 0.0


def test_control_characters_of_names_never_reach_the_terminal(toy: Path, capsys) -> None:
    """Neither those of ASCII nor the eight-bit ones, nor what turns the direction of writing."""
    evil = "up\x1b]0;owned\x07\x9b31m\u202e\r"
    model = onnx.load(toy / "toy.onnx")
    model.graph.node[0].input[1] = model.graph.initializer[0].name = evil
    onnx.save(model, toy / "toy.onnx")
    commands = [
        ["inspect", str(toy / "toy.onnx")],
        ["inspect", str(toy / "toy.onnx"), "--segments"],
        ["verify", str(toy / "toy.onnx"), "--sparsity", "2:4"],
    ]
    codes = [main(command) for command in commands]
    codes += [main([*command, "--json"]) for command in commands]
    codes += [prune(toy), prune(toy, "--json"), prune(toy, "--exclude", evil, "--include", evil)]
    assert codes == [0, 0, 1] * 2 + [0, 0, 2]
    captured = capsys.readouterr()
    assert captured.out.count(r"up\x1b]0;owned\x07\x9b31m\u202e\r") > 3
    for text in (captured.out, captured.err):
        assert all(each.isprintable() or each == "\n" for each in text)
    assert main(["inspect", str(toy / "toy.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sites"][0]["name"] == evil
