"""Optimum: export, prune, load again, judge. Run by `make test-optimum`, in its own environment."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import llama
import minilm
import numpy as np
import pytest
import stsb
from docs_commands import commands, programs, run, run_python

optimum = pytest.importorskip(
    "optimum.onnxruntime", reason="Optimum has an environment of its own: make test-optimum"
)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ENCODER, DECODER = commands("optimum.md")
logger = logging.getLogger(__name__)
PYTHON = programs("optimum.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder after the first block of the docs: an exported encoder, and a pruned one."""
    root = tmp_path_factory.mktemp("optimum")
    (root / "minilm").symlink_to(minilm.weights_folder())
    (root / "texts.txt").write_text("\n\n".join(minilm.docstrings(300)))
    run(ENCODER, root)
    return root


def embed_with(folder: Path) -> stsb.Embed:
    from transformers import AutoTokenizer

    model = optimum.ORTModelForFeatureExtraction.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def embed(texts: list[str]) -> np.ndarray:
        vectors = []
        for start in range(0, len(texts), 32):
            feed = tokenizer(texts[start : start + 32], padding=True, return_tensors="np")
            states = model(**feed).last_hidden_state
            mask = feed["attention_mask"][..., None]
            vectors.append((states * mask).sum(1) / mask.sum(1))
        return np.concatenate(vectors)

    return embed


def test_the_encoder_is_2_4_and_loads_with_its_tokenizer(folder: Path) -> None:
    pruned = folder / "pruned"
    assert {path.name for path in pruned.iterdir()} >= {
        *("model_pruned.onnx", "config.json", "ort_config.json", "tokenizer.json"),
        *("iobs_config.json", "report.json"),
    }
    written = json.loads((pruned / "iobs_config.json").read_text())
    assert written["options"]["sparsity"] == "2:4"
    assert written["totals"]["sites"] == 36
    run("iobs-onnx verify pruned/model_pruned.onnx --sparsity 2:4", folder)
    assert embed_with(pruned)(["It runs."]).shape == (1, 384)


def test_the_encoder_keeps_its_task(folder: Path, shared: Path) -> None:
    dense = stsb.spearman(embed_with(folder / "exported"), shared)
    sparse = stsb.spearman(embed_with(folder / "pruned"), shared)
    logger.info("STS-B Spearman: dense %.4f, 2:4 %.4f", dense, sparse)
    assert dense == pytest.approx(0.867, abs=0.002)
    assert sparse > dense - 0.04


@pytest.mark.parametrize("program", PYTHON)
def test_the_program_in_the_docs(folder: Path, program: str) -> None:
    assert "[1, 5, 384]" in run_python(program, folder)
    report = json.loads((folder / "pruned-from-python/report.json").read_text())
    assert report["calibration"]["samples"] + report["calibration"]["held_out_samples"] == 64
    assert report["calibration"]["padding_excluded"] is True


def test_an_ort_model_and_a_dataset_in_memory(folder: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer

    from iobs_onnx.integrations.optimum import ORTPruner

    model = optimum.ORTModelForFeatureExtraction.from_pretrained(folder / "exported")
    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    dataset = Dataset.from_dict(dict(tokenizer(minilm.docstrings(20), truncation=True)))
    pruner = ORTPruner.from_pretrained(model)
    saved = pruner.prune({"sparsity": "2:4", "solver": "magnitude"}, tmp_path, dataset, "half")
    assert (saved / "model_half.onnx").is_file()
    assert optimum.ORTModelForFeatureExtraction.from_pretrained(saved).config.hidden_size == 384


def test_faults_are_one_line_and_exit_code_2(folder: Path, tmp_path: Path) -> None:
    from iobs_onnx.errors import DataError, ModelError
    from iobs_onnx.integrations.optimum import ORTPruner

    with pytest.raises(ModelError, match=r"expected one \.onnx file, found none"):
        ORTPruner.from_pretrained(tmp_path)
    pruner = ORTPruner.from_pretrained(folder / "exported")
    with pytest.raises(DataError, match="columns text are none of the model's inputs"):
        pruner.get_calibration_dataset(folder / "texts.txt")
    with pytest.raises(DataError, match="unknown kind of file"):
        pruner.get_calibration_dataset(folder / "exported" / "model.onnx")
    command = [str(Path(sys.executable).with_name("optimum-cli")), "onnxruntime", "prune"]
    command += ["--onnx_model", str(folder / "exported"), "-o", str(tmp_path), "--sparsity", "2:x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "2:x" in done.stderr.splitlines()[-1]


def test_a_causal_language_model_with_past_key_values(tmp_path: Path, shared: Path) -> None:
    from transformers import AutoTokenizer

    source = shared / "models/stories15M.onnx"
    llama.rebuild(source, shared / "models/stories15M.tokenizer.model", tmp_path / "llama")
    lines = (json.dumps({"text": story}) for story in llama.stories(shared, 0, 60))
    (tmp_path / "stories.jsonl").write_text("\n".join(lines))
    run(DECODER, tmp_path)
    found = {}
    for name in ("llama-onnx", "llama-pruned"):
        model = optimum.ORTModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.use_cache
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        found[name] = llama.perplexity(model, tokenizer, llama.stories(shared, 60, 120))
        start = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
        told = model.generate(**start, max_new_tokens=24, do_sample=False)
        again = model.generate(**start, max_new_tokens=24, do_sample=False, use_cache=False)
        assert told.tolist() == again.tolist()  # the cache changes nothing
    logger.info("perplexity: %s", found)
    assert found["llama-onnx"] == pytest.approx(7.07, abs=0.02)
    assert found["llama-pruned"] < 2.2 * found["llama-onnx"]
    run(
        "iobs-onnx verify llama-pruned/model_pruned.onnx --sparsity 2:4 --exclude '*lm_head*'",
        tmp_path,
    )


def test_no_command_of_optimum_breaks_or_slows() -> None:
    register = "import optimum.commands.register.register_iobs_onnx, sys; "
    run_program = [sys.executable, "-c"]
    heavy = "print(sorted({'torch', 'onnxruntime', 'onnx', 'rich'} & set(sys.modules)))"
    before = subprocess.check_output(
        [*run_program, "import optimum.commands.onnxruntime.base, sys; " + heavy], text=True
    )
    assert subprocess.check_output([*run_program, register + heavy], text=True) == before
    # Not even an installation of ours that is broken takes optimum-cli down.
    broken = "import sys; sys.modules['iobs_onnx.commands.prune'] = None; "
    broken += "sys.argv = ['optimum-cli', 'env']; "
    broken += "from optimum.commands.optimum_cli import main; main()"
    assert "optimum" in subprocess.check_output([*run_program, broken], text=True)
