"""Small random mixtures of experts, as torch exports them.

`python tests/operators/experts.py` writes the files below `tests/data` that the fast tests read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[1] / "data"
_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "experts_implementation": "batched_mm",
    "use_cache": False,
}


def export(kind: str, path: Path) -> Path:
    """Export a `mixtral` or `qwen2_moe` model of `input_ids` to `logits`; return the path."""
    import torch
    from transformers import (
        MixtralConfig,
        MixtralForCausalLM,
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
    )

    torch.manual_seed(0)
    if kind == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**_COMMON, num_local_experts=4))
    else:
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        shared = {"shared_expert_intermediate_size": 48}
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**_COMMON, **experts, **shared))

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids).logits

    axes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}}
    program = torch.onnx.export(
        Logits().eval(),
        (torch.ones(2, 8, dtype=torch.int64),),
        dynamo=True,
        dynamic_shapes=axes,
        input_names=["input_ids"],
        output_names=["logits"],
        verbose=False,
    )
    for node in program.model.graph.all_nodes():
        for key in [*node.metadata_props]:  # the rest is bulk, and names files of the machine
            if key != "pkg.torch.onnx.name_scopes":
                del node.metadata_props[key]
    program.save(path, external_data=False)
    return path


if __name__ == "__main__":
    for name in ("mixtral", "qwen2_moe"):
        export(name, DATA / f"{name}.onnx")
