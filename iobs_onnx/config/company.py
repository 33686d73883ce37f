"""Which options go with which."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iobs_onnx.errors import OptionError
from iobs_onnx.sparsity import NM

if TYPE_CHECKING:
    from iobs_onnx.config import PruneConfig


def require_company(config: PruneConfig) -> None:
    """Refuse options that mean nothing beside the others.

    Raises:
        OptionError: names the first.
    """
    if config.preset is not None and config.solver != "iobs":
        raise OptionError(f"preset {config.preset}: belongs to solver iobs, not {config.solver}")
    if config.permute and not isinstance(config.sparsity, NM):
        raise OptionError(
            f"permute: the order of channels means nothing to {config.sparsity}; use N:M or "
            "leave it out"
        )
    if config.quantize is not None and config.emit == "sparse-initializer":
        raise OptionError("quantize int8: integers are written as dense tensors; emit dense")
    if config.forgetting_factor and config.rounds == 1:
        raise OptionError(
            f"forgetting_factor {config.forgetting_factor}: one round has none before it; give "
            "rounds"
        )
    for name in ("distill_steps", "distill_time"):
        if config.training == "none" and (value := getattr(config, name)) is not None:
            raise OptionError(f"{name} {value}: goes with distill blocks, model or both")
    if ":" in config.device and (config.workers is not None or config.ray is not None):
        raise OptionError(
            f"device {config.device}: Ray gives each worker a GPU of its own, which is its only "
            "one; give device cuda"
        )
    if config.min_metric is not None and config.metric is None:
        raise OptionError(f"min_metric {config.min_metric}: give the metric that it bounds")
    _require_free_shares(config)


def _require_free_shares(config: PruneConfig) -> None:
    if config.patterns:
        listed = " ".join(map(str, config.patterns))
        if config.allocate == "uniform" or isinstance(config.sparsity, NM):
            raise OptionError(
                f"patterns {listed}: go with allocate error or loss, and with sparsity as the "
                "fraction to remove, such as 50%"
            )
        if min(pattern.density for pattern in config.patterns) > config.sparsity.density:
            raise OptionError(
                f"patterns {listed}: none removes as much as sparsity {config.sparsity}; name one"
            )
    if config.allocate == "uniform" or not isinstance(config.sparsity, NM):
        return
    same = f"allocate {config.allocate}: {config.sparsity} is the same for every site by its nature"
    if config.allocate == "error":
        raise OptionError(f"{same}; give a fraction removed, such as 50%")
    if config.budget_error is None and config.min_metric is None:
        raise OptionError(
            f"{same}; give a fraction removed, such as 50%, or budget_error or min_metric, for "
            "which it says what goes back to dense first"
        )
