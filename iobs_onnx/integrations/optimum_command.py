"""`optimum-cli onnxruntime prune`; imports nothing heavy before it runs."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from iobs_onnx.commands.prune import add_options
from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import IobsError

# Data come from --dataset, or from these of our own options.
_OPTIONS = [field.name for field in dataclasses.fields(PruneConfig)]


class PruneCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """Prune an exported model."""

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare the options: Optimum's way of naming a model, then those of iobs-onnx."""
        parser.add_argument(
            "--onnx_model", type=Path, required=True, help="folder of the exported model"
        )
        parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
        parser.add_argument("--file_name", help="ONNX file, where the folder holds several")
        parser.add_argument(
            "--dataset",
            metavar="FILE",
            help="calibration data, read by the datasets library: a .txt, .jsonl, .json, .csv or "
            ".parquet of text or of the model's inputs, or a folder of them",
        )
        parser.add_argument(
            "--text_column", default="text", help="column to tokenize (default: text)"
        )
        parser.add_argument(
            "--num_samples", type=int, default=256, help="samples of --dataset (default: 256)"
        )
        parser.add_argument(
            "--max_length", type=int, default=128, help="tokens in a text (default: 128)"
        )
        add_options(parser)

    def run(self) -> None:
        """Prune; a fault of the input is one line, and exit code 2."""
        from iobs_onnx.integrations.optimum import ORTPruner

        arguments = self.args
        given = {name: getattr(arguments, name) for name in _OPTIONS}
        options = {name: value for name, value in given.items() if value is not None}
        try:
            pruner = ORTPruner.from_pretrained(arguments.onnx_model, arguments.file_name)
            dataset = None
            if arguments.dataset is not None:
                dataset = pruner.get_calibration_dataset(
                    arguments.dataset,
                    num_samples=arguments.num_samples,
                    preprocess_function=_tokenize(arguments),
                )
            pruner.prune(options, arguments.output, dataset)
        except IobsError as error:
            self.parser.error(" ".join(str(error).split()))


def _tokenize(arguments: Any) -> Callable[[dict[str, list[Any]]], dict[str, list[Any]]]:
    """Return a function that tokenizes the text column of a batch, where there is one."""
    from transformers import AutoTokenizer

    tokenizer = None

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        nonlocal tokenizer
        if arguments.text_column not in batch:
            return {}
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(arguments.onnx_model)
        texts = batch[arguments.text_column]
        return dict(tokenizer(texts, truncation=True, max_length=arguments.max_length))

    return tokenize


INFO = CommandInfo(
    name="prune",
    help="Make the weights of an ONNX model sparse (iobs-onnx).",
    subcommand_class=PruneCommand,
)
