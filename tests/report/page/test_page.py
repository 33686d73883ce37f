"""The page holds what the report holds, needs nothing else, and trusts no name."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from iobs_onnx.cli import main
from iobs_onnx.report.page import render_report
from iobs_onnx.report.page.words import duration

VOID = {"meta", "link", "input", "br", "wbr", "img", "hr", "use", "path"}


class Elements(HTMLParser):
    """Collects elements and text; complains about tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data) -> None:
        if not self._open or self._open[-1] not in {"script", "style"}:
            self.text += data + " "


def test_the_page_is_one_file_whose_links_lead_somewhere(run: Path) -> None:
    elements = Elements((run / "report" / "report.html").read_text())
    ids = [attrs["id"] for _, attrs in elements.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in elements.found:
        assert "src" not in attrs, tag
        target = attrs.get("href") or ""
        assert not target or target == "data:," or target.removeprefix("#") in ids, target
        for value in attrs.values():
            for name in re.findall(r"url\(#([^)]*)\)", value or ""):
                assert name in ids
    assert "@import" not in str(elements.found)


def test_the_page_says_what_the_report_says(run: Path, report: dict[str, Any]) -> None:
    elements = Elements((run / "report" / "report.html").read_text())
    for site in report["sites"]:
        assert f"{site['layer_error']:.4g}" in elements.text
        assert f"{site['error_ratio']:.3f}" in elements.text
    assert f"{report['totals']['error_ratio_geomean']:.2f} ×" in elements.text
    (output,) = report["verification"]
    assert f"{output['cosine']:.5f}" in elements.text
    assert report["declined"][0]["reason"] in elements.text
    assert report["output"]["sha256"] in elements.text
    assert "CPU kernels do not use weight sparsity" in elements.text
    # The marks of the figures name their sites, in both widths.
    tips = [attrs["data-tip"] for _, attrs in elements.found if "data-tip" in attrs]
    for site in report["sites"]:
        assert sum(str(tip).startswith(site["name"]) for tip in tips) == 8


def test_names_are_text_wherever_they_stand(run: Path) -> None:
    html = (run / "report" / "report.html").read_text()
    scripts = [attrs for tag, attrs in Elements(html).found if tag == "script"]
    assert len(scripts) == 2
    assert "<script>alert" not in html


def test_mask_pictures_are_those_of_the_written_model(run: Path, report: dict[str, Any]) -> None:
    import base64

    model = onnx.load(run / "out.onnx")
    stored = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for site in report["sites"]:
        weight = stored[site["initializer"]]
        kept = (weight if site["axis"] else weight.T) != 0
        picture = site["mask"]
        rows, columns = picture["corner_shape"]
        assert picture["shape"] == list(kept.shape)
        bits = np.unpackbits(np.frombuffer(base64.b64decode(picture["corner"]), np.uint8))
        assert np.array_equal(bits[: rows * columns].reshape(rows, columns), kept[:rows, :columns])
        cells = np.frombuffer(base64.b64decode(picture["density"]), np.uint8)
        cells = cells.reshape(picture["density_shape"])
        for i, some in enumerate(np.array_split(np.arange(len(kept)), cells.shape[0])):
            if len(kept) % cells.shape[0] == 0 and kept.shape[1] % cells.shape[1] == 0:
                blocks = kept[some].reshape(len(some), cells.shape[1], -1).mean((0, 2))
                assert np.allclose(cells[i] / 255, blocks, atol=0.5 / 255 + 1e-9)
    assert {tuple(site["mask"]["shape"]) for site in report["sites"]} == {(96, 16), (16, 96)}


def test_the_mask_of_a_large_weight_stays_small() -> None:
    from iobs_onnx.report.mask_picture import MaskPicture

    weight = np.random.default_rng(0).normal(size=(3, 500, 700))
    picture = MaskPicture.of(weight)
    assert picture.shape == [1500, 700]
    assert len(picture.corner) + len(picture.density) < 2048


def test_rounds_are_drawn_where_there_are_some(report: dict[str, Any]) -> None:
    assert 'id="rounds"' not in render_report(report)
    report["rounds"] = [
        {"round": 1, "metric": 0.5, "accepted": True, "best": False},
        {"round": 2, "metric": 0.4, "accepted": True, "best": True},
        {"round": 3, "metric": 0.6, "accepted": False, "best": False},
    ]
    html = render_report(report)
    assert 'id="rounds"' in html
    assert html.count(">best<") == 2  # wide and narrow
    assert "Metric by round" in html
    for item in report["rounds"]:
        item |= {"metric": None, "error": 0.3}
    assert "Output error by round" in render_report(report)
    report["rounds"] = report["rounds"][:1]
    assert 'id="rounds"' not in render_report(report)


def test_allocation_is_drawn_where_it_was_measured(report: dict[str, Any]) -> None:
    html = render_report(report)
    assert 'id="allocation"' not in html
    assert "given the same pattern, 2:4" in Elements(html).text
    curve = [[0.0, 0.0], [0.5, 0.04], [0.95, 0.36]]
    names = [report["sites"][0]["name"], "left dense"]
    report["allocation"] = [
        {"site": name, "removed": removed, "curve": curve}
        for name, removed in zip(names, (0.25, 0.5), strict=True)
    ]
    report["options"]["sparsity"] = "0.4"
    html = render_report(report)
    elements = Elements(html)
    assert "Together they remove 40.0%." in elements.text
    assert "given the same pattern" not in elements.text
    assert "Hollow dots" in elements.text
    tips = [attrs["data-tip"] for _, attrs in elements.found if "data-tip" in attrs]
    # A curve and a dot, wide and narrow; what has no row in the table leads nowhere.
    assert tips.count(f"{names[0]}\n25.0% removed") == 4
    assert not any(tip.startswith("left dense") for tip in tips)


def test_what_is_unknown_is_drawn_all_the_same(report: dict[str, Any]) -> None:
    """NaN is null in JSON; a report may have no comparison, no outputs, no picture, no path."""
    report["verification"] = []
    report["options"]["compare"] = None
    report["model"]["path"] = None
    report["totals"]["layer_error_geomean"] = report["totals"]["error_ratio_geomean"] = None
    for site in report["sites"]:
        site |= {"layer_error": None, "error_ratio": None, "compared_error": None, "mask": None}
    html = render_report(report)
    Elements(html)
    assert "model in memory" in html
    assert 'id="against"' not in html
    assert 'id="mask"' not in html


def test_warnings_stand_on_top(report: dict[str, Any]) -> None:
    report["calibration"]["notes"] = ["3 samples were dropped"]
    report["calibration"]["padding_kept"] = ["tap one"]
    report["model"]["checker"] = "it is broken"
    report["sites"][0]["dead_inputs"] = 2
    text = Elements(render_report(report)).text
    head = text[: text.index("Layer by layer")]
    for said in ("3 samples were dropped", "tap one", "it is broken", "1 weight had inputs"):
        assert said in head


def test_what_became_of_the_file_is_told_as_on_the_terminal(report: dict[str, Any]) -> None:
    text = Elements(render_report(report)).text
    assert f"Written as dense: {report['output']['bytes']:,} bytes" in text
    assert "int8" not in text
    assert "another order" not in text
    report["totals"] |= {"nearest_error_geomean": 0.25, "layer_error_geomean": 0.125}
    for site in report["sites"]:
        site["quantized"] = "int8"
    report["permutations"] = [
        {"taken": True, "before": 0.2, "after": 0.1},
        {"taken": False, "reason": "read by others"},
    ]
    text = Elements(render_report(report)).text
    assert "2 weights are int8" in text
    assert "would be 0.25 instead of 0.125" in text
    assert "1 set of channels put in another order: 0.500 ×" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (42.4, "42 s"), (185, "3 min 5 s"), (7800, "2 h 10 min"), (None, "–")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_report_command_draws_the_same_page_again(run: Path, tmp_path: Path, capsys) -> None:
    source = str(run / "report" / "report.json")
    page = tmp_path / "deep" / "page.html"
    assert main(["report", source, "-o", str(page)]) == 0
    assert page.read_text() == (run / "report" / "report.html").read_text()
    assert str(page) in capsys.readouterr().out
    assert main(["report", source, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == source.replace(".json", ".html")


def test_compare_marks_the_best_and_writes_a_page(
    run: Path, report: dict[str, Any], tmp_path: Path, capsys
) -> None:
    better = json.loads(json.dumps(report))
    better["options"]["damping"] = 0.5
    for site in better["sites"]:
        site["layer_error"] /= 2
    for name, data in (("a", report), ("b", better)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(data))
    paths = [str(tmp_path / name / "report.json") for name in "ab"]
    page = tmp_path / "both.html"
    assert main(["compare", *paths, "--html", str(page)]) == 0
    assert "layer error" in capsys.readouterr().out
    assert main(["compare", *paths, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == ["a", "b"]
    assert found["options"] == [{"name": "damping", "values": ["0.01", "0.5"]}]
    for row, site in zip(found["sites"], report["sites"], strict=True):
        assert row["layer_errors"] == [site["layer_error"], site["layer_error"] / 2]
    text = Elements(page.read_text()).text
    assert "2 runs side by side" in text
    assert f"{report['sites'][0]['layer_error'] / 2:.4g}" in text


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not JSON"),
        ("[]", "schema_version"),
        ('{"schema_version": 99}', "schema_version 99"),
        ('{"schema_version": 1}', "'model' is missing"),
        (None, "cannot be read"),
        ("broken site", "not as iobs-onnx writes it"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(
    content: str | None, text: str, report: dict[str, Any], tmp_path: Path, capsys
) -> None:
    path, whole = tmp_path / "x.json", json.dumps(report)
    if content == "broken site":
        del report["sites"][0]["layer_error"]
        content = json.dumps(report)
    if content is not None:
        path.write_text(content)
    other = tmp_path / "y.json"
    other.write_text(whole)
    for command in (["report", str(path)], ["compare", str(path), str(other)]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "x.json" in error
        if command[0] == "report":
            assert text in error
    assert not (tmp_path / "x.html").exists()


def test_a_page_never_replaces_its_report(run: Path, capsys) -> None:
    source = str(run / "report" / "report.json")
    assert main(["report", source, "-o", source]) == 2
    assert main(["compare", source]) == 2
    assert main(["compare", source, source]) == 2


def test_runs_are_named_by_what_tells_them_apart() -> None:
    from iobs_onnx.commands.compare import run_names

    assert run_names(["x/a/report.json", "x/b/report.json"]) == ["a", "b"]
    assert run_names(["x/a/r/report.json", "x/b/r/report.json"]) == ["a", "b"]
    assert run_names(["a.json", "b.json"]) == ["a", "b"]
    assert run_names(["x/a/r1.json", "x/b/r1.json", "x/b/r2.json"]) == ["a/r1", "b/r1", "b/r2"]


def test_the_curve_of_distillation_is_drawn_where_there_is_one(report: dict[str, Any]) -> None:
    assert 'id="distillation"' not in render_report(report)
    facts = {"steps": 20, "before": 0.5, "after": 0.2, "accepted": True, "notes": []}
    curve = [[0, None, 0.5], [10, 0.4, 0.2], [20, 0.1, 0.3]]
    html = render_report({**report, "distillation": {**facts, "curve": curve}})
    assert 'id="distillation"' in html
    assert "Held-out loss by step" in html
    assert "held-out loss 0.5 before, 0.2 after" in html


def test_blocks_that_were_distilled_are_listed_with_their_reasons(report: dict[str, Any]) -> None:
    trained = {"outputs": ["first"], "sites": ["w"], "before": 0.5, "after": 0.125}
    left = {"outputs": ["second"], "sites": [], "before": None, "after": None}
    each = [{**trained, "accepted": True}, {**left, "accepted": False, "reason": "no such weight"}]
    facts = {"steps": 8, "before": 0.75, "after": 0.25, "accepted": True, "notes": []}
    html = render_report({**report, "distillation": {"blocks": {**facts, "each": each}}})
    assert 'id="distillation"' in html
    assert "0.125" in html
    assert "no such weight" in html
    assert "1 of 2 blocks came nearer" in html
    assert "Held-out loss by step" not in html
