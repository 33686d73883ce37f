"""Options: what each takes, what it says otherwise, and which fault is named first."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from iobs_onnx.config import PruneConfig, make_config
from iobs_onnx.errors import OptionError

NO_NUMBER = (True, "1", None, float("nan"), -0.5)
# Options, values that they take, values that they refuse, and what they expect instead.
RULES: list[tuple[tuple[str, ...], tuple[Any, ...], tuple[Any, ...], str]] = [
    (("mask_padding", "residual", "pack"), (True, False), (1, "yes", None), "true or false"),
    (("permute",), (True, False), (1, None), "true or false"),
    (
        ("samples", "batch_size", "sequence_length"),
        (1, 10**9, None),
        (0, True, 1.0, "1"),
        "an integer of at least 1",
    ),
    (("distill_steps", "workers"), (1, 400, None), (0, True, 1.0), "an integer of at least 1"),
    (
        ("ray",),
        ("auto", "10.0.0.1:6379", "head:1", None),
        ("", "head", "ray://head:10001", 6379),
        "host:port or auto",
    ),
    (
        ("device",),
        ("auto", "cpu", "cuda", "cuda:0", "cuda:11"),
        ("gpu", "cuda:", "cuda:-1", "cuda:x", "cpu:0", 0, None),
        "auto, cpu, cuda or cuda:N",
    ),
    (
        ("distill_time",),
        (0.5, 60, None),
        (0, -1.0, True, "soon"),
        "a time such as 90s, 20min or 1.5h",
    ),
    (("rounds",), (1, 3), (0, True, 1.0, None), "an integer of at least 1"),
    (("start_token",), (0, 5, None), (-1, True, 1.0), "an integer of at least 0"),
    (("seed",), (0, 5), (-1, True, None), "an integer of at least 0"),
    (
        ("damping", "learning_rate"),
        (0, 0.5, 2.0),
        (*NO_NUMBER, float("inf")),
        "a number of at least 0",
    ),
    (
        ("bias_compensation", "random_tokens", "forgetting_factor"),
        (0, 0.5),
        (*NO_NUMBER, float("inf")),
        "a number of at least 0",
    ),
    (("bias_compensation", "forgetting_factor"), (1, 1.0), (1.5,), "a share at most 1"),
    (("random_tokens",), (0.9,), (1, 1.5), "a share below 1"),
    (
        ("max_output_error", "budget_error"),
        (0, 0.5, float("inf"), None),
        (True, "1", float("nan"), -0.5),
        "a number of at least 0",
    ),
    (("min_metric",), (-1, 0.5, None), (True, "1"), "a number"),
    (
        ("text", "tokenizer", "images", "audio", "preprocess"),
        ("a", None),
        (1, True, ["a"]),
        "a path",
    ),
]
CASES = [(name, *rule) for names, *rule in RULES for name in names]
BASE = {"sparsity": "2:4", "rounds": 2, "metric": "module:callable", "distill": "model"}


@pytest.mark.parametrize(("name", "taken", "refused", "expected"), CASES)
def test_values(name: str, taken: Any, refused: Any, expected: str) -> None:
    for value in taken:
        assert getattr(make_config({**BASE, name: value}), name) == value
    for value in refused:
        with pytest.raises(OptionError) as caught:
            make_config({**BASE, name: value})
        assert str(caught.value) == f"{name} {value!r}: expected {expected}"


def test_choices() -> None:
    found = [f for f in dataclasses.fields(PruneConfig) if "choices" in f.metadata["how"]]
    assert len(found) == 11
    for option in found:
        choices = option.metadata["how"]["choices"]
        for value in (1, "other", ["cpu"], *([] if option.default is None else [None])):
            with pytest.raises(OptionError) as caught:
                make_config({**BASE, option.name: value})
            known = ", ".join(choices)
            assert str(caught.value) == f"{option.name} {value!r} is unknown: choose from {known}"


def test_every_option_is_checked() -> None:
    rest = {"sparsity", "include", "exclude", "patterns", "memory_budget", "metric"}
    by_choice = {f.name for f in dataclasses.fields(PruneConfig) if "choices" in f.metadata["how"]}
    assert {f.name for f in dataclasses.fields(PruneConfig)} == (
        {name for name, *_ in CASES} | rest | by_choice
    )


def test_what_is_kept_in_another_form() -> None:
    config = make_config(
        {
            "sparsity": 0.5,
            "include": "a*",
            "exclude": ["b", "c"],
            "text": Path("folder", "a.txt"),
            "memory_budget": "2KiB",
            "distill": "model",
            "distill_time": "1.5h",
        }
    )
    assert str(config.sparsity) == "0.5"
    assert (config.include, config.exclude) == (("a*",), ("b", "c"))
    assert config.text == str(Path("folder", "a.txt"))
    assert config.memory_budget == 2048
    assert config.distill_time == 5400
    assert make_config({"sparsity": "2:4", "include": None}).include == ()
    for size in (0, -1, True, "2 pounds"):
        with pytest.raises(OptionError, match=f"^memory_budget {size!r}: expected a size such as"):
            make_config({"sparsity": "2:4", "memory_budget": size})


def test_a_value_is_refused_before_its_company() -> None:
    with pytest.raises(OptionError, match=r"^forgetting_factor 2: expected a share at most 1$"):
        make_config({"sparsity": "2:4", "forgetting_factor": 2})
    with pytest.raises(OptionError, match=r"^forgetting_factor 1: one round has none before it"):
        make_config({"sparsity": "2:4", "forgetting_factor": 1})
    with pytest.raises(OptionError, match=r"^min_metric 0\.5: give the metric that it bounds$"):
        make_config({"sparsity": "2:4", "min_metric": 0.5})


def test_a_gpu_has_a_number() -> None:
    assert [make_config({**BASE, "device": d}).gpu for d in ("auto", "cuda", "cuda:3")] == [0, 0, 3]
    for more in ({"workers": 2}, {"ray": "auto"}):
        with pytest.raises(OptionError, match=r"^device cuda:1: Ray gives each worker a GPU of"):
            make_config({"sparsity": "2:4", "device": "cuda:1", **more})
