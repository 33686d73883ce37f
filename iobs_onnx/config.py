"""Every option, declared once: the command line, TOML files and the Python API all read this."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from iobs_onnx.errors import OptionError
from iobs_onnx.sparsity import NM, Pattern, parse_sparsity

# `solvers` holds the classes; their names stand here so that `--help` need not import torch.
SOLVER_NAMES = (
    *("iobs", "sparsegpt", "alps", "wanda", "magnitude"),
    *("obd", "ebd", "obs", "lobs", "cbs"),
)


def _option(default: Any, text: str, **how: Any) -> Any:
    """A field with its help text and, in `how`, what argparse needs to read it."""
    return field(default=default, metadata={"help": text, "how": how})


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """How to prune; see `iobs-onnx prune --help` for what each field means.

    Raises:
        OptionError: a value is malformed or out of range.
    """

    sparsity: Pattern = field(
        metadata={
            "help": "2:4, any N:M (N kept of M consecutive inputs), or the fraction removed: "
            "0.7 or 70%%",
            "how": {"metavar": "PATTERN"},
        }
    )
    solver: str = _option("iobs", "how each layer is solved", choices=SOLVER_NAMES)
    preset: Literal["fast", "balanced", "best"] | None = _option(
        None,
        "how long iobs searches (default: balanced)",
        choices=("fast", "balanced", "best"),
    )
    text: str | None = _option(
        None,
        "calibrate on text: a file with one text a line, a .jsonl with a field text, or a "
        "directory of both",
        metavar="PATH",
    )
    tokenizer: str | None = _option(
        None,
        "tokenizer.json for --text (default: the one beside the model)",
        metavar="FILE",
    )
    sequence_length: int | None = _option(
        None,
        "tokens in a text, samples in a piece of audio, or size of a dynamic axis of random data "
        "(default: what the model fixes, else 128; one second of audio)",
        type=int,
        metavar="N",
    )
    start_token: int | None = _option(
        None,
        "first token of every text that --calibration self writes, where the model was trained to "
        "see one (default: one drawn for each text)",
        type=int,
        metavar="ID",
    )
    pack: bool = _option(
        False,
        "let texts follow one another in full sequences, without padding",
        action="store_true",
    )
    images: str | None = _option(
        None, "calibrate on the images below this directory", metavar="DIR"
    )
    audio: str | None = _option(
        None, "calibrate on the recordings below this directory", metavar="DIR"
    )
    preprocess: str | None = _option(
        None,
        "preprocessor_config.json for --images or --audio (default: the one beside the model)",
        metavar="FILE",
    )
    samples: int | None = _option(
        None,
        "calibrate on this many samples: rows, texts, images, pieces of audio, else feeds "
        "(default: all but those held out)",
        type=int,
        metavar="N",
    )
    batch_size: int | None = _option(
        None,
        "samples in a batch, except of ready-made feeds (default: what the model fixes, else 16)",
        type=int,
        metavar="N",
    )
    include: tuple[str, ...] = _option(
        (), "prune only sites whose name matches", action="append", metavar="GLOB"
    )
    exclude: tuple[str, ...] = _option(
        (), "leave sites whose name matches as they are", action="append", metavar="GLOB"
    )
    damping: float = _option(
        0.01, "added to the Hessian's diagonal, as a fraction of its mean", type=float
    )
    sequential: Literal["none", "segment", "site"] = _option(
        "site",
        "how often the model as pruned so far is run again: never (one-shot), after each block, "
        "or before each site that depends on another",
        choices=("none", "segment", "site"),
    )
    target: Literal["layer", "dense"] = _option(
        "dense",
        "what a layer's output should equal on pruned inputs: its own dense weights' output, or "
        "that of the dense model",
        choices=("layer", "dense"),
    )
    residual: bool = _option(
        True,
        "with the dense target, do not let a site that is added to a stream make up for the "
        "stream's error",
        action="store_false",
    )
    learning_rate: float = _option(
        0.5, "how far each step goes towards the target: 0 not at all, 1 all the way", type=float
    )
    bias_compensation: float = _option(
        0.5, "the share of a site's mean error that its bias makes up for", type=float
    )
    random_tokens: float = _option(
        0.3,
        "share of the calibration that is random tokens, for models that look up tokens: keeps "
        "the pruned model from fitting the calibration text too closely",
        type=float,
    )
    rounds: int = _option(
        1,
        "walks through the model, each on its own part of the calibration data; the one with the "
        "best metric, or else the lowest held-out error, is written",
        type=int,
        metavar="T",
    )
    forgetting_factor: float = _option(
        0.0,
        "with --rounds: what earlier rounds measured counts this much in the next, from 0 (not at "
        "all) to 1 (as much as what is new)",
        type=float,
        metavar="F",
    )
    allocate: Literal["uniform", "error"] = _option(
        "uniform",
        "how a fraction removed is spread over the sites: the same for each, or more where it "
        "costs less layer error",
        choices=("uniform", "error"),
    )
    metric: str | Callable[[str], float] | None = _option(  # noqa: RUF009 - a field, see _option
        None,
        "judge sparse models by module:callable(path) -> float, higher is better",
        metavar="MODULE:CALLABLE",
    )
    min_metric: float | None = _option(
        None, "leave the costliest sites dense until the metric is at least this", type=float
    )
    budget_error: float | None = _option(
        None,
        "leave the costliest sites dense until the mean relative error of the outputs on held-out "
        "samples is at most this",
        type=float,
    )
    memory_budget: int | None = _option(
        None,
        "bytes of weights and Hessians in a segment, and of activations between two: 2GB, 500MB "
        "(default: a quarter of the machine's memory)",
        metavar="SIZE",
    )
    permute: bool = _option(
        False,
        "first put channels in an order in which an N:M pattern loses less, where the graph allows "
        "it; the model computes the same",
        action="store_true",
    )
    emit: Literal["dense", "sparse-initializer", "mask"] = _option(
        "dense",
        "how pruned weights are written: dense tensors with zeros, ONNX sparse tensors, or dense "
        "with the masks in OUT.onnx.masks.safetensors",
        choices=("dense", "sparse-initializer", "mask"),
    )
    quantize: Literal["int8"] | None = _option(
        None,
        "also round the weights that are kept, one scale an output, and let them make up for it; "
        "written as integers with DequantizeLinear",
        choices=("int8",),
    )
    mask_padding: bool = _option(
        True, "count positions whose attention_mask is 0 as well", action="store_false"
    )
    compare: str | None = _option(
        None, "also solve every site with this one and report the ratio", choices=SOLVER_NAMES
    )
    provider: Literal["auto", "cpu", "cuda"] = _option(
        "auto", "where ONNX Runtime runs the model", choices=("auto", "cpu", "cuda")
    )
    device: Literal["auto", "cpu", "cuda"] = _option(
        "auto", "where Hessians are summed and layers solved", choices=("auto", "cpu", "cuda")
    )
    max_output_error: float | None = _option(
        None,
        "write nothing, and exit with 4, where the relative error of an output on held-out samples "
        "is above this",
        type=float,
        metavar="X",
    )
    seed: int = _option(0, "chooses samples where not all are used", type=int, metavar="N")

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", parse_sparsity(self.sparsity))
        for name in ("include", "exclude"):
            value = getattr(self, name)
            globs = (value,) if isinstance(value, str) else tuple(value or ())
            object.__setattr__(self, name, globs)
        object.__setattr__(self, "memory_budget", parse_bytes(self.memory_budget))
        for option in dataclasses.fields(self):
            if "choices" in option.metadata["how"]:
                self._require_choice(option.name)
        self._require_company()
        for name in ("text", "tokenizer", "images", "audio", "preprocess"):
            if not isinstance(value := getattr(self, name), str | os.PathLike | None):
                raise OptionError(f"{name} {value!r}: expected a path")
            object.__setattr__(self, name, None if value is None else os.fspath(value))
        for name in ("samples", "batch_size", "sequence_length", "rounds", "start_token", "seed"):
            self._require_integer(name, least=0 if name in ("start_token", "seed") else 1)
        self._require_numbers()
        for name in ("mask_padding", "residual", "pack"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} {getattr(self, name)!r}: expected true or false")

    def _require_numbers(self) -> None:
        shares = ("bias_compensation", "forgetting_factor", "random_tokens")
        for name in ("damping", "learning_rate", *shares):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < float("inf"):
                raise OptionError(f"{name} {value!r}: expected a number of at least 0")
        for name in shares:
            value, below = getattr(self, name), name == "random_tokens"
            if value > 1 or (below and value == 1):
                most = "below" if below else "at most"
                raise OptionError(f"{name} {value!r}: expected a share {most} 1")
        for name in ("max_output_error", "budget_error"):
            self._require_bound(name)
        for name in ("mask_padding", "residual", "pack", "permute"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} {getattr(self, name)!r}: expected true or false")

    def _require_company(self) -> None:
        """Refuse options that mean nothing beside the others."""
        if self.preset is not None and self.solver != "iobs":
            raise OptionError(f"preset {self.preset}: belongs to solver iobs, not {self.solver}")
        if self.permute and not isinstance(self.sparsity, NM):
            raise OptionError(
                f"permute: the order of channels means nothing to {self.sparsity}; use N:M or "
                "leave it out"
            )
        if self.quantize is not None and self.emit == "sparse-initializer":
            raise OptionError("quantize int8: integers are written as dense tensors; emit dense")
        if self.forgetting_factor and self.rounds == 1:
            raise OptionError(
                f"forgetting_factor {self.forgetting_factor}: one round has none before it; give "
                "rounds"
            )
        if not isinstance(self.min_metric, int | float | None):
            raise OptionError(f"min_metric {self.min_metric!r}: expected a number")
        if self.min_metric is not None and self.metric is None:
            raise OptionError(f"min_metric {self.min_metric}: give the metric that it bounds")
        if self.allocate == "error" and isinstance(self.sparsity, NM):
            raise OptionError(
                f"allocate error: {self.sparsity} is the same for every site by its nature; give "
                "a fraction removed, such as 50%"
            )

    def _require_choice(self, name: str) -> None:
        options = next(f for f in dataclasses.fields(self) if f.name == name)
        value, choices = getattr(self, name), options.metadata["how"]["choices"]
        optional = options.default is None
        if value not in choices and not (optional and value is None):
            raise OptionError(f"{name} {value!r} is unknown: choose from {', '.join(choices)}")

    def _require_bound(self, name: str) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and value >= 0):
            raise OptionError(f"{name} {value!r}: expected a number of at least 0")

    def _require_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None and name in ("samples", "batch_size", "sequence_length", "start_token"):
            return
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise OptionError(f"{name} {value!r}: expected an integer of at least {least}")

    def as_dict(self) -> dict[str, Any]:
        """Return every option as JSON types, for the report."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "sparsity": str(self.sparsity),
            "metric": getattr(self.metric, "__qualname__", self.metric),
            "include": list(self.include),
            "exclude": list(self.exclude),
        }


def parse_bytes(size: int | str | None) -> int | None:
    """Read `2GB`, `500MB`, `64KiB` or a number of bytes.

    Raises:
        OptionError: it is none of these.
    """
    if size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0):
        return size
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", str(size).upper())
    number = int(float(found[1]) * units[found[2] or ""]) if found else 0
    if number < 1:
        raise OptionError(f"memory_budget {size!r}: expected a size such as 2GB or 500MB")
    return number


def make_config(options: Mapping[str, Any]) -> PruneConfig:
    """Return the configuration; an unknown option is an error that names the nearest known one.

    Raises:
        OptionError: an option is unknown, malformed or out of range, or `sparsity` is missing.
    """
    known = [f.name for f in dataclasses.fields(PruneConfig)]
    require_known(options, known, "option")
    if "sparsity" not in options:
        raise OptionError("sparsity is missing: give 2:4, any N:M, or the fraction removed")
    return PruneConfig(**options)


def read_toml(path: str | Path, known: list[str]) -> dict[str, Any]:
    """Return the options in a TOML file; `-` and `_` in keys are the same.

    Raises:
        OptionError: the file cannot be read, is not TOML, or holds a key that is not `known`.
    """
    try:
        with Path(path).open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise OptionError(f"config {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"config {path}: not TOML: {error}") from error
    options = {key.replace("-", "_"): value for key, value in table.items()}
    require_known(options, known, f"config {path}: key")
    return options


def require_known(options: Mapping[str, Any], known: list[str], what: str) -> None:
    """Raise an OptionError that names the nearest known option for one that is not."""
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise OptionError(f"{what} {name!r} is unknown: {hint}")
