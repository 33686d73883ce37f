"""Every option, declared once: the command line, TOML files and the Python API all read this."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from iobs_onnx.config.checks import (
    Check,
    address,
    as_given,
    boolean,
    bound,
    device,
    finite,
    globs,
    integer,
    nm_patterns,
    number,
    one_of,
    parse_bytes,
    path,
    require_known,
    seconds,
    share,
    share_below_one,
)
from iobs_onnx.config.company import require_company
from iobs_onnx.errors import OptionError
from iobs_onnx.sparsity import NM, Pattern, parse_sparsity

# `solvers` holds the classes; their names stand here so that `--help` need not import torch.
SOLVER_NAMES = (
    *("iobs", "sparsegpt", "alps", "wanda", "magnitude"),
    *("obd", "ebd", "obs", "lobs", "cbs"),
)


def _option(default: Any, text: str, check: Check = as_given, **how: Any) -> Any:
    """A field with its help text, its check and, in `how`, what argparse needs to read it.

    Choices and switches are checked as such. Where None is the default it means "not given", and
    is not checked.
    """
    if "choices" in how:
        check = one_of(how["choices"])
    elif "action" in how and how["action"].startswith("store_"):
        check = boolean
    return field(default=default, metadata={"help": text, "check": check, "how": how})


Training: TypeAlias = Literal["none", "blocks", "model", "both"]


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
            "check": lambda _, value: parse_sparsity(value),
            "how": {"metavar": "PATTERN"},
        }
    )
    solver: str = _option("iobs", "how each layer is solved", choices=SOLVER_NAMES)
    preset: Literal["fast", "balanced", "best"] | None = _option(
        None,
        "how long iobs searches (default: balanced); best also trains what is kept, as --distill "
        "model does",
        choices=("fast", "balanced", "best"),
    )
    text: str | None = _option(
        None,
        "calibrate on text: a file with one text a line, a .jsonl with a field text, or a "
        "directory of both",
        check=path,
        metavar="PATH",
    )
    tokenizer: str | None = _option(
        None,
        "tokenizer.json for --text (default: the one beside the model)",
        check=path,
        metavar="FILE",
    )
    sequence_length: int | None = _option(
        None,
        "tokens in a text, samples in a piece of audio, or size of a dynamic axis of random data "
        "(default: what the model fixes, else 128; one second of audio)",
        check=integer(1),
        type=int,
        metavar="N",
    )
    start_token: int | None = _option(
        None,
        "first token of every text that --calibration self writes, where the model was trained to "
        "see one (default: one drawn for each text)",
        check=integer(0),
        type=int,
        metavar="ID",
    )
    pack: bool = _option(
        False,
        "let texts follow one another in full sequences, without padding",
        action="store_true",
    )
    images: str | None = _option(
        None, "calibrate on the images below this directory", check=path, metavar="DIR"
    )
    audio: str | None = _option(
        None, "calibrate on the recordings below this directory", check=path, metavar="DIR"
    )
    preprocess: str | None = _option(
        None,
        "preprocessor_config.json for --images or --audio (default: the one beside the model)",
        check=path,
        metavar="FILE",
    )
    samples: int | None = _option(
        None,
        "calibrate on this many samples: rows, texts, images, pieces of audio, else feeds "
        "(default: all but those held out)",
        check=integer(1),
        type=int,
        metavar="N",
    )
    batch_size: int | None = _option(
        None,
        "samples in a batch, except of ready-made feeds (default: what the model fixes, else 16)",
        check=integer(1),
        type=int,
        metavar="N",
    )
    include: tuple[str, ...] = _option(
        (),
        "prune only sites whose name matches",
        check=globs,
        action="append",
        metavar="GLOB",
    )
    exclude: tuple[str, ...] = _option(
        (),
        "leave sites whose name matches as they are",
        check=globs,
        action="append",
        metavar="GLOB",
    )
    damping: float = _option(
        0.01,
        "added to the Hessian's diagonal, as a fraction of its mean",
        check=finite,
        type=float,
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
        0.5,
        "how far each step goes towards the target: 0 not at all, 1 all the way",
        check=finite,
        type=float,
    )
    bias_compensation: float = _option(
        0.5,
        "the share of a site's mean error that its bias makes up for",
        check=share,
        type=float,
    )
    random_tokens: float = _option(
        0.3,
        "share of the calibration that is random tokens, for models that look up tokens: keeps "
        "the pruned model from fitting the calibration text too closely",
        check=share_below_one,
        type=float,
    )
    rounds: int = _option(
        1,
        "walks through the model, each on its own part of the calibration data; the one with the "
        "best metric, or else the lowest held-out error, is written",
        check=integer(1),
        type=int,
        metavar="T",
    )
    forgetting_factor: float = _option(
        0.0,
        "with --rounds: what earlier rounds measured counts this much in the next, from 0 (not at "
        "all) to 1 (as much as what is new)",
        check=share,
        type=float,
        metavar="F",
    )
    distill: Literal["none", "blocks", "model", "both"] | None = _option(
        None,
        "train what is kept, biases and norms towards the dense model, without labels: block by "
        "block towards its activations, the whole model towards its outputs, or one after the "
        "other; taken only if the held-out loss falls. With --calibration self the model goes on "
        "writing while the whole is trained (default: none; with --preset best model, where that "
        "can be done)",
        choices=("none", "blocks", "model", "both"),
    )
    distill_steps: int | None = _option(
        None,
        "steps of --distill, each on one batch: of the whole model (default: 400; 1600 where "
        "preset best trains), and of all blocks together (default: eight passes of each over the "
        "data)",
        check=integer(1),
        type=int,
        metavar="N",
    )
    distill_time: float | None = _option(
        None,
        "in place of --distill-steps: as many as fit into this: 90s, 20min, 1.5h; of both, half "
        "for each",
        check=seconds,
        metavar="TIME",
    )
    on_interrupt: Literal["stop", "keep"] = _option(
        "stop",
        "what Ctrl-C does while the whole model is trained: end the run and write nothing, or end "
        "the training and go on with what is best so far",
        choices=("stop", "keep"),
    )
    allocate: Literal["uniform", "error", "loss"] = _option(
        "uniform",
        "how a fraction removed is spread over the sites: the same for each, or more where it "
        "costs less layer error, or less of the model's own loss; with N:M, loss says which sites "
        "go back to dense first under a bound",
        choices=("uniform", "error", "loss"),
    )
    patterns: tuple[NM, ...] = _option(
        (),
        "with --allocate and a fraction removed: an N:M pattern that sites choose from, in place "
        "of fractions of their own; may be given more than once, and at least that fraction goes",
        check=nm_patterns,
        action="append",
        metavar="N:M",
    )
    metric: str | Callable[[str], float] | None = _option(  # noqa: RUF009 - a field, see _option
        None,
        "judge sparse models by module:callable(path) -> float, higher is better",
        metavar="MODULE:CALLABLE",
    )
    min_metric: float | None = _option(
        None,
        "leave the costliest sites dense until the metric is at least this",
        check=number,
        type=float,
    )
    budget_error: float | None = _option(
        None,
        "leave the costliest sites dense until the mean relative error of the outputs, caches "
        "aside, on held-out samples is at most this",
        check=bound,
        type=float,
    )
    memory_budget: int | None = _option(
        None,
        "bytes of weights and Hessians in a segment, and of activations between two: 2GB, 500MB "
        "(default: a quarter of the machine's memory)",
        check=lambda _, value: parse_bytes(value),
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
    device: str = _option(
        "auto",
        "where Hessians are summed and layers solved: auto, cpu, cuda, or cuda:N for GPU N, which "
        "ONNX Runtime then takes too",
        check=device,
        metavar="DEVICE",
    )
    workers: int | None = _option(
        None,
        "calibrate and solve in this many processes, by Ray; the result is the same "
        "(default with --ray: one a GPU, or else one a machine)",
        check=integer(1),
        type=int,
        metavar="N",
    )
    ray: str | None = _option(
        None,
        "take the workers of this cluster: host:port of its head, or auto on one of its machines",
        check=address,
        metavar="ADDRESS",
    )
    max_output_error: float | None = _option(
        None,
        "write nothing, and exit with 4, where the relative error of an output on held-out samples "
        "is above this",
        check=bound,
        type=float,
        metavar="X",
    )
    seed: int = _option(
        0, "chooses samples where not all are used", check=integer(0), type=int, metavar="N"
    )

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if value is not None or option.default is not None:
                kept = option.metadata["check"](option.name, value)
                object.__setattr__(self, option.name, kept)
        require_company(self)

    @property
    def training(self) -> Training:
        """What is trained: what `distill` says, or else the preset."""
        return self.distill or ("model" if self.preset == "best" else "none")

    @property
    def gpu(self) -> int:
        """The number of the GPU, where torch and ONNX Runtime compute on one."""
        return int(self.device.partition(":")[2] or 0)

    def as_dict(self) -> dict[str, Any]:
        """Return every option as JSON types, for the report."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "sparsity": str(self.sparsity),
            "metric": getattr(self.metric, "__qualname__", self.metric),
            "include": list(self.include),
            "exclude": list(self.exclude),
            "patterns": list(map(str, self.patterns)),
        }


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
