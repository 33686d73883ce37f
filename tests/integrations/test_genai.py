"""Models of ONNX Runtime GenAI's builder: small stored ones, and the builder itself (slow)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import genai
import numpy as np
import pytest
from docs_commands import commands, programs, run, run_python

import iobs_onnx
from iobs_onnx.cli import main
from iobs_onnx.passes import find_token_input, load_model

FP32 = genai.DATA / "genai-fp32"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Lines of this very file."""
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(line for line in Path(__file__).read_text().splitlines() if line))
    return path


@pytest.mark.parametrize("data", ["text", "self"])
def test_a_file_of_the_builder_is_pruned_by_the_documented_options(
    texts: Path, tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--text", str(texts)] if data == "text" else ["--calibration", "self"]
    sparse = f"{tmp_path / 'sparse'}{os.sep}"
    command = ["prune", str(FP32 / "model.onnx"), *given, "--sequence-length", "16", "--samples"]
    assert main([*command, "16", "--sparsity", "2:4", "--output", sparse, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["totals"]["sites"] == 5
    assert report["calibration"]["random_tokens"] == 0.3
    assert {out["name"] for out in report["verification"]} >= {"logits", "present.0.key"}
    assert all(np.isfinite(out["relative_error"]) for out in report["verification"])
    assert main(["verify", f"{sparse}model.onnx", "--sparsity", "2:4"]) == 0
    assert "does not know SimplifiedLayerNormalization" in capsys.readouterr().out
    assert {file.name for file in Path(sparse).iterdir()} == {f.name for f in FP32.iterdir()}


def test_tokens_are_found_behind_a_transposed_and_a_packed_table() -> None:
    for kind in ("fp32", "int4"):
        model = load_model(genai.DATA / f"genai-{kind}" / "model.onnx")
        assert find_token_input(model) == ("input_ids", 258)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder after the commands of the docs: a Hugging Face model, dense and sparse."""
    pytest.importorskip("onnxruntime_genai", reason="the wheel is not installed")
    import minilm

    root = tmp_path_factory.mktemp("genai")
    genai.hugging_face(root / "smollm2")
    (root / "texts.txt").write_text("\n".join(minilm.docstrings(200)))
    for block in commands("language-models.md"):
        run(block, root)
    return root


@pytest.mark.slow
def test_the_documented_way_from_a_hugging_face_folder(folder: Path) -> None:
    assert {f.name for f in (folder / "sparse").iterdir()} == {
        f.name for f in (folder / "dense").iterdir()
    }
    assert iobs_onnx.verify(folder / "sparse" / "model.onnx", sparsity="2:4").ok
    report = json.loads((folder / "report" / "report.json").read_text())
    assert report["calibration"]["random_tokens"] == 0.3
    (program,) = programs("language-models.md")
    assert run_python(program, folder).startswith("It ")


@pytest.mark.slow
def test_generation_takes_the_most_likely_token_of_the_sparse_model(folder: Path) -> None:
    import onnxruntime
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder / "sparse"))
    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(max_length=20, do_sample=False)
    generator = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens(onnxruntime_genai.Tokenizer(model).encode("It runs"))
    while not generator.is_done():
        generator.generate_next_token()
    told = np.array(generator.get_sequence(0), np.int64)[None]
    session = onnxruntime.InferenceSession(str(folder / "sparse" / "model.onnx"))
    empty = np.zeros((1, 2, 0, 16), np.float32)
    past = {i.name: empty for i in session.get_inputs() if i.name.startswith("past")}
    feed = {"input_ids": told, "attention_mask": np.ones_like(told), **past}
    (logits,) = session.run(["logits"], feed)
    start = len("It runs")  # a token a byte
    assert logits[0].argmax(-1)[start - 1 : -1].tolist() == told[0, start:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "provider"), [("fp32", "cpu"), ("fp16", "cuda")])
def test_precisions_of_the_builder(
    tmp_path: Path, texts: Path, precision: str, provider: str
) -> None:
    pytest.importorskip("onnxruntime_genai", reason="the wheel is not installed")
    source = genai.hugging_face(tmp_path / "hf")
    genai.build(source, tmp_path / "dense", precision, provider)
    result = iobs_onnx.prune(
        tmp_path / "dense" / "model.onnx",
        text=str(texts),
        sequence_length=16,
        sparsity="2:4",
        output=f"{tmp_path / 'sparse'}{os.sep}",
    )
    assert result.report.totals["sites"] == 10
    assert iobs_onnx.verify(result.output, sparsity="2:4").ok
