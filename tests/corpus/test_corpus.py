"""Every model file of the onnx package, real models and random graphs: no failure, nothing lost.

`make test` runs a slice; `make corpus` all of it, with a table of what became of the models.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import corpus_models
import exports
import genai
import numpy as np
import onnx
import pytest
from corpus_judge import Feed, Verdict, differences, judge
from hypothesis import HealthCheck, given, settings
from onnx import numpy_helper, version_converter

import iobs_onnx
from iobs_onnx.passes import load_model, save_model

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
FILES = sorted(DATA.rglob("*.onnx"))
# Precisions of ONNX Runtime GenAI's builder, and what it then builds for.
_BUILT = [("fp32", "cpu"), ("fp16", "cuda"), ("int4", "cpu")]
logger = logging.getLogger("corpus")
# Between INFO, at which ONNX Runtime is named for every session, and WARNING.
_TABLE = 25


def stored_feeds(path: Path) -> list[Feed]:
    """Return, twice, the input data that lie beside a model of the onnx package, or random data."""
    model = onnx.load(path, load_external_data=False)
    stored = {tensor.name for tensor in model.graph.initializer}
    feed = {}
    for index, info in enumerate(i for i in model.graph.input if i.name not in stored):
        file = path.parent / "test_data_set_0" / f"input_{index}.pb"
        kind = info.type.tensor_type
        if not info.type.HasField("tensor_type"):
            return []
        if file.is_file():
            feed[info.name] = numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))
        elif kind.elem_type == onnx.TensorProto.FLOAT:
            shape = [dim.dim_value or 1 for dim in kind.shape.dim]
            feed[info.name] = np.random.default_rng(index).random(shape, np.float32)
        else:
            return []
    return [feed, feed]


def tell(name: str, verdicts: Sequence[Verdict]) -> None:
    """Log the table of a corpus."""
    pruned = [verdict for verdict in verdicts if verdict.pruned]
    refused = Counter(verdict.refused for verdict in verdicts if verdict.refused)
    declined: Counter[str] = Counter()
    for verdict in verdicts:
        for why, count in verdict.declined.items():
            # Names would tell every weight apart.
            declined[re.sub(r"'[^']*'", "'...'", why)] += count
    lines = [
        f"{name}: {len(verdicts)} models, {len(pruned)} pruned "
        f"({sum(verdict.pruned for verdict in pruned)} weights), 0 failures"
    ]
    lines += [f"  {count:4} models as they were: {why}" for why, count in refused.most_common()]
    lines += [f"  {count:4} weights declined: {why}" for why, count in declined.most_common()]
    logger.log(_TABLE, "\n".join(lines))


def judge_all(name: str, paths: Iterable[Path], scratch: Path) -> int:
    """Judge files of the onnx package; return how many weights were pruned."""
    verdicts = []
    for path in paths:
        try:
            verdicts.append(judge(path, stored_feeds(path), scratch))
        except Exception as error:
            raise AssertionError(f"{path}: {error}") from error
    tell(name, verdicts)
    return sum(verdict.pruned for verdict in verdicts)


def test_slice_of_the_package_files(tmp_path: Path) -> None:
    assert judge_all("slice", FILES[5::8], tmp_path) >= 2


@pytest.mark.slow
def test_package_files(tmp_path: Path) -> None:
    assert len(FILES) > 100
    assert judge_all("onnx/backend/test/data", FILES, tmp_path) >= 8


@pytest.mark.slow
def test_package_files_too_old_for_onnx_runtime(tmp_path: Path) -> None:
    """Files of opsets below 7, which ONNX Runtime does not promise to run, brought to opset 12."""
    (tmp_path / "scratch").mkdir()
    verdicts = []
    for path in FILES:
        feeds, model = stored_feeds(path), onnx.load(path)
        if feeds and 1 <= model.opset_import[0].version < 7 and not model.opset_import[0].domain:
            newer = version_converter.convert_version(model, 12)
            newer.ir_version = 7
            onnx.save(newer, tmp_path / "newer.onnx")
            verdicts.append(judge(tmp_path / "newer.onnx", feeds, tmp_path / "scratch"))
    tell("of these, opset 6 brought to opset 12", verdicts)
    assert sum(verdict.pruned for verdict in verdicts) >= 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the generator's own overflows and deprecations
def test_generated_package_cases(tmp_path: Path) -> None:
    """The models that the onnx package generates, one an operator, come back field by field."""
    from onnx.backend.test.case import model as model_cases
    from onnx.backend.test.case import node as node_cases

    cases = [*node_cases.collect_testcases(), *model_cases.collect_testcases()]
    cases = [case for case in cases if case.model is not None]
    assert len(cases) > 1000
    candidates = 0
    for case in cases:
        found = iobs_onnx.inspect(case.model)
        candidates += len(found.sites) + len(found.declined)
        save_model(load_model(case.model), tmp_path / "copy.onnx")
        lost = differences(case.model, onnx.load(tmp_path / "copy.onnx"))
        assert not lost, (case.name, lost)
    logger.log(
        _TABLE,
        "generated by onnx.backend.test: %d models inspected and written back, "
        "%d candidates, 0 failures",
        len(cases),
        candidates,
    )


@pytest.mark.slow
def test_files_of_a_folder(tmp_path: Path) -> None:
    """Files of anywhere, given as the variable MODELS, are inspected and come back as they were."""
    folder = os.environ.get("MODELS")
    if not folder:
        pytest.skip("no folder of further models: MODELS=folder make corpus")
    verdicts = []
    for path in sorted(Path(folder).rglob("*.onnx")):
        try:
            verdicts.append(judge(path, [], tmp_path))
        except Exception as error:
            raise AssertionError(f"{path}: {error}") from error
    tell(f"{sum(verdict.sites for verdict in verdicts)} sites in {Path(folder).name}", verdicts)


def judge_drawn(drawn: corpus_models.Drawn) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        path, scratch = Path(folder, "drawn.onnx"), Path(folder, "out")
        scratch.mkdir()
        onnx.save(drawn.model, path)
        return judge(path, drawn.feeds, scratch)


def judge_examples(count: int) -> list[Verdict]:
    verdicts = []

    # Without a database and from a fixed seed, so that a run can be repeated.
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(corpus_models.models())
    def examine(drawn: corpus_models.Drawn) -> None:
        verdicts.append(judge_drawn(drawn))

    examine()
    return verdicts


def test_slice_of_random_models() -> None:
    verdicts = judge_examples(40)
    assert sum(verdict.pruned > 0 for verdict in verdicts) >= 10


@pytest.mark.slow
def test_random_models() -> None:
    verdicts = judge_examples(1000)
    tell("random graphs", verdicts)
    assert sum(verdict.pruned > 0 for verdict in verdicts) >= 300


def judge_language(name: str, path: Path, scratch: Path) -> Verdict:
    model = onnx.load(path)
    feeds = [exports.language_feed(model, seed=seed) for seed in range(3)]
    verdict = judge(path, feeds, scratch, "fast")
    tell(name, [verdict])
    return verdict


@pytest.mark.parametrize("name", exports.LANGUAGE)
def test_language_models(name: str, tmp_path: Path) -> None:
    assert judge_language(name, exports.LANGUAGE[name], tmp_path).pruned >= 4


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [32, 64, 128])
@pytest.mark.parametrize(("precision", "provider"), _BUILT)
def test_models_of_the_builder(hidden: int, precision: str, provider: str, tmp_path: Path) -> None:
    """Llamas of one to three layers, built by ONNX Runtime GenAI."""
    pytest.importorskip("onnxruntime_genai", reason="the wheel is not installed")
    source = genai.hugging_face(tmp_path / "hf", hidden=hidden, layers=1 + hidden // 64)
    genai.build(source, tmp_path / "built", precision, provider)
    (tmp_path / "scratch").mkdir()
    name = f"genai {precision} for {provider}, {hidden} wide"
    path = tmp_path / "built" / "model.onnx"
    assert judge_language(name, path, tmp_path / "scratch").pruned >= 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's exporter
def test_text_to_speech(tmp_path: Path) -> None:
    path = exports.speech(tmp_path / "speech.onnx")
    (tmp_path / "scratch").mkdir()
    draw = np.random.default_rng(8)
    feeds: list[Feed] = [{"input_ids": draw.integers(1, 30, (1, 8 + n))} for n in range(6)]
    verdict = judge(path, feeds, tmp_path / "scratch", "fast")
    tell("text to speech", [verdict])
    assert verdict.pruned >= 20


def random_bytes(count: int) -> list[Feed]:
    rng = np.random.default_rng(5)
    return [{"bytes": rng.integers(0, 257, (8, 2048), np.int32)} for _ in range(count)]


def test_magika(magika_model: Path, tmp_path: Path) -> None:
    verdict = judge(magika_model, random_bytes(3), tmp_path, "fast")
    tell("magika", [verdict])
    assert verdict.pruned == 2


@pytest.mark.slow
def test_minilm(minilm_model: Path, minilm_feeds: list[Feed], tmp_path: Path) -> None:
    verdict = judge(minilm_model, minilm_feeds[:3], tmp_path, "fast")
    tell("all-MiniLM-L6-v2", [verdict])
    assert verdict.pruned == 36


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "feed"),
    [("resnet20", {"x": (8, 3, 32, 32)}), ("stories15M", {"input_ids": (2, 32)})],
)
def test_further_models(
    name: str, feed: dict[str, tuple[int, ...]], shared: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(6)
    feeds: list[Feed] = [
        {
            key: rng.integers(1, 1000, shape)
            if key == "input_ids"
            else rng.standard_normal(shape).astype(np.float32)
            for key, shape in feed.items()
        }
        for _ in range(3)
    ]
    verdict = judge(shared / "models" / f"{name}.onnx", feeds, tmp_path, "fast")
    tell(name, [verdict])
    assert verdict.pruned >= 10
