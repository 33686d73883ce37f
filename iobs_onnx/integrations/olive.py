"""The pass `IOBSPruning` for Olive; needs `pip install 'iobs-onnx[olive]'`.

`python -m iobs_onnx.integrations.olive PACKAGE.json` writes Olive's package configuration with the
pass in it, for `olive run --package-config PACKAGE.json`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import typing
from pathlib import Path
from typing import Any

from iobs_onnx.config import PruneConfig
from iobs_onnx.errors import DependencyError, OptionError
from iobs_onnx.pruning.pipeline import prune

try:
    from olive.common.config_utils import validate_config
    from olive.data.config import DataConfig
    from olive.hardware.accelerator import AcceleratorSpec
    from olive.model import ONNXModelHandler
    from olive.model.utils import resolve_onnx_path
    from olive.package_config import OlivePackageConfig
    from olive.passes import Pass
    from olive.passes.pass_config import BasePassConfig, PassConfigParam
except ImportError as error:
    raise DependencyError(
        f"the Olive integration needs Olive: pip install 'iobs-onnx[olive]' ({error})"
    ) from error

_FIELDS = dataclasses.fields(PruneConfig)
# What the fields accept before they are parsed.
_WRITTEN = {
    "sparsity": str | float,
    "include": list[str],
    "exclude": list[str],
    "memory_budget": str | int,
}


class IOBSPruning(Pass):  # type: ignore[misc]
    """Make the weights of an ONNX model sparse; takes every option of `iobs-onnx prune`."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        hints = typing.get_type_hints(PruneConfig)
        options = {
            field.name: PassConfigParam(
                type_=typing.Optional[_WRITTEN.get(field.name, hints[field.name])],  # noqa: UP045
                default_value=None,
                required=field.name == "sparsity",
                description=field.metadata["help"],
            )
            for field in _FIELDS
        }
        data = PassConfigParam(
            type_=DataConfig | dict | None,
            default_value=None,
            description="calibration data, unless text, images or audio names them",
        )
        return {**options, "data_config": data}

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        given = {field.name: getattr(config, field.name) for field in _FIELDS}
        output = resolve_onnx_path(output_model_path)
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        reader = None
        if config.data_config is not None:
            data = validate_config(config.data_config, DataConfig).to_data_container()
            reader = data.create_calibration_dataloader(
                model_path=model.model_path, io_config=model.io_config
            )
        result = prune(
            model.model_path,
            calibration=reader,
            output=output,
            **{name: value for name, value in given.items() if value is not None},
        )
        result.report.save(Path(output).parent)
        return ONNXModelHandler(output)


def write_package_config(path: str | Path) -> Path:
    """Write Olive's package configuration with the pass among its own; return the path.

    `--package-config` takes the place of Olive's own file, so that is where this starts.

    Raises:
        OptionError: the file cannot be written.
    """
    default = Path(OlivePackageConfig.get_default_config_path())
    config: dict[str, Any] = json.loads(default.read_text(encoding="utf-8"))
    config["passes"]["IOBSPruning"] = {
        "module_path": f"iobs_onnx.integrations.olive.{IOBSPruning.__name__}",
        "supported_providers": ["*"],
        "supported_accelerators": ["*"],
        "supported_precisions": ["*"],
        "supported_algorithms": [],
        "supported_quantization_encodings": [],
        "dataset": "dataset_optional",
    }
    try:
        Path(path).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OptionError(f"package config {path}: cannot be written ({error.strerror})") from error
    return Path(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m iobs_onnx.integrations.olive PACKAGE.json")
    write_package_config(sys.argv[1])
