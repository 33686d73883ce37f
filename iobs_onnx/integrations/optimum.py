"""A pruner for Optimum, used like its `ORTQuantizer`; needs `pip install 'iobs-onnx[optimum]'`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iobs_onnx.config import PruneConfig, make_config
from iobs_onnx.errors import DataError, DependencyError, ModelError
from iobs_onnx.passes import load_model
from iobs_onnx.pruning.pipeline import prune
from iobs_onnx.runtime import TableSamples, input_specs

try:
    from optimum.onnxruntime import ORTConfig, ORTModel
    from optimum.utils.save_utils import maybe_save_preprocessors
    from transformers import AutoConfig, GenerationConfig
except ImportError as error:
    raise DependencyError(
        f"the Optimum integration needs Optimum: pip install 'iobs-onnx[optimum]' ({error})"
    ) from error

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig

_BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv"}
_BUILDERS |= {".parquet": "parquet"}
CONFIG_NAME = "iobs_config.json"


class ORTPruner:
    """Prunes one ONNX file of a folder that Optimum exported.

    Args:
        onnx_model_path: the `.onnx` file.
        config: of the model. Default: the `config.json` beside it.

    Raises:
        ModelError: there is no such file, or no config beside it.
    """

    def __init__(self, onnx_model_path: Path, config: PretrainedConfig | None = None) -> None:
        self.onnx_model_path = Path(onnx_model_path)
        if not self.onnx_model_path.is_file():
            raise ModelError(f"model {self.onnx_model_path}: no such file")
        folder = self.onnx_model_path.parent
        try:
            self.config = config or AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ModelError(f"model {folder}: no config.json that Optimum can read") from error

    @classmethod
    def from_pretrained(
        cls, model_or_path: ORTModel | str | Path, file_name: str | None = None
    ) -> ORTPruner:
        """Return a pruner for an `ORTModel`, or for a folder that `optimum-cli export` wrote.

        Args:
            model_or_path: the model, or the folder.
            file_name: of the ONNX file, where the folder holds several.

        Raises:
            ModelError: the folder holds no ONNX file, or several and no name is given.
        """
        if isinstance(model_or_path, ORTModel):
            return cls(Path(model_or_path.path), model_or_path.config)
        folder = Path(model_or_path)
        if file_name is None:
            found = sorted(path.name for path in folder.glob("*.onnx"))
            if len(found) != 1:
                names = f"several ({', '.join(found)}): give file_name" if found else "none"
                raise ModelError(f"model {folder}: expected one .onnx file, found {names}")
            file_name = found[0]
        return cls(folder / file_name)

    def get_calibration_dataset(
        self,
        dataset_name: str | Path,
        num_samples: int | None = 100,
        dataset_config_name: str | None = None,
        dataset_split: str | None = None,
        preprocess_function: Callable[..., Any] | None = None,
        preprocess_batch: bool = True,
        seed: int = 2016,
        token: bool | str | None = None,
    ) -> Dataset:
        """Load a dataset, choose samples, preprocess them, and keep the model's inputs.

        Empty lines of a text are left out.

        Args:
            dataset_name: a local `.txt`, `.jsonl`, `.json`, `.csv` or `.parquet`, a folder of them,
                or a name on the Hub.
            num_samples: the most to keep; None for all.
            dataset_config_name: where the dataset has several.
            dataset_split: by default `train`, which is what local files are.
            preprocess_function: maps examples to inputs, a tokenizer for instance.
            preprocess_batch: whether it takes a batch of examples.
            seed: of the choice.
            token: for the Hub.

        Raises:
            DataError: the dataset cannot be loaded, or yields none of the model's inputs.
        """
        from datasets import load_dataset

        path = Path(dataset_name)
        where: dict[str, Any] = {"path": str(dataset_name)}
        if path.is_file():
            if path.suffix.lower() not in _BUILDERS:
                known = ", ".join(_BUILDERS)
                raise DataError(f"dataset {path}: unknown kind of file; known are {known}")
            where = {"path": _BUILDERS[path.suffix.lower()], "data_files": str(path)}
        try:
            dataset = load_dataset(
                **where,
                name=dataset_config_name,
                split=dataset_split or "train",
                token=token,
            )
        except (OSError, ValueError) as error:
            raise DataError(f"dataset {dataset_name}: cannot be loaded: {error}") from error
        dataset = dataset.filter(lambda row: any(value not in ("", None) for value in row.values()))
        if num_samples is not None and num_samples < len(dataset):
            dataset = dataset.shuffle(seed=seed).select(range(num_samples))
        if preprocess_function is not None:
            dataset = dataset.map(preprocess_function, batched=preprocess_batch)
        inputs = {spec.name for spec in input_specs(load_model(self.onnx_model_path))}
        kept = [name for name in dataset.column_names if name in inputs]
        if not kept:
            raise DataError(
                f"dataset {dataset_name}: columns {', '.join(dataset.column_names)} are none of "
                f"the model's inputs {', '.join(sorted(inputs))}; give a preprocess_function"
            )
        return dataset.select_columns(kept)

    def prune(
        self,
        pruning_config: PruneConfig | Mapping[str, Any] | str,
        save_dir: str | Path,
        calibration_dataset: Any = None,
        file_suffix: str | None = "pruned",
    ) -> Path:
        """Prune the model and write a folder that `ORTModelFor...from_pretrained` loads.

        It holds `<stem>_<suffix>.onnx`, `config.json`, `ort_config.json`, the preprocessors,
        `iobs_config.json` (the options and totals) and `report.json`.

        Args:
            pruning_config: options; a string is the sparsity pattern.
            save_dir: made if needed; not the model's own folder unless there is a suffix.
            calibration_dataset: a `datasets.Dataset` whose columns are inputs, or any calibration
                that :func:`iobs_onnx.prune` takes; None where an option names the data.
            file_suffix: of the ONNX file; None or empty for none.

        Returns:
            The folder.

        Raises:
            InputError: the model, the data or an option is at fault.
        """
        config = _config(pruning_config)
        folder = Path(save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        suffix = f"_{file_suffix}" if file_suffix else ""
        result = prune(
            self.onnx_model_path,
            calibration=self._calibration(calibration_dataset),
            output=folder / f"{self.onnx_model_path.stem}{suffix}.onnx",
            **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)},
        )
        self.config.save_pretrained(folder)
        ORTConfig().save_pretrained(folder)
        maybe_save_preprocessors(self.onnx_model_path.parent, folder)
        if (self.onnx_model_path.parent / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(self.onnx_model_path.parent).save_pretrained(folder)
        written = {
            "iobs_onnx_version": importlib.metadata.version("iobs-onnx"),
            "options": result.report.options,
            "totals": result.report.totals,
        }
        (folder / CONFIG_NAME).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        result.report.save(folder)
        return folder

    def _calibration(self, given: Any) -> Any:
        if not hasattr(given, "column_names"):
            return given
        inputs = input_specs(load_model(self.onnx_model_path))
        plain = given.with_format(None)
        label = f"dataset of {', '.join(given.column_names)}"
        return TableSamples(
            len(plain), lambda index: plain.select(list(index)).to_list(), inputs, label
        )


def _config(given: PruneConfig | Mapping[str, Any] | str) -> PruneConfig:
    if isinstance(given, PruneConfig):
        return given
    return make_config(given if isinstance(given, Mapping) else {"sparsity": given})
