"""Graph in, graph out: what reads and edits ONNX models, without running or solving anything."""

from iobs_onnx.passes.checks.changes import bound_changes
from iobs_onnx.passes.checks.check import (
    Violation,
    achieved_sparsity,
    check_model,
    check_pattern,
    unknown_to_checker,
)
from iobs_onnx.passes.checks.deploy import (
    Engine,
    deployment_warnings,
    eligibility_2_4,
    engines_2_4,
    foreign_operators,
    is_2_4,
    trtexec_command,
)
from iobs_onnx.passes.edit.biases import Surroundings, find_surroundings, rewrite_biases
from iobs_onnx.passes.edit.integers import (
    Codes,
    channel_axis,
    require_opset,
    store_as_integers,
    why_not_integers,
)
from iobs_onnx.passes.edit.permute import Chain, find_chains, permute_channels
from iobs_onnx.passes.edit.rewrite import rewrite
from iobs_onnx.passes.edit.sparse_form import masks_of, sparse_bytes, store_sparsely
from iobs_onnx.passes.files.atomic import replacing
from iobs_onnx.passes.files.folders import locked, scratch, working_in, writing_to
from iobs_onnx.passes.files.load_save import (
    bring_into_memory,
    load_model,
    mask_file,
    model_hash,
    require_output,
    save_model,
    saving,
)
from iobs_onnx.passes.files.place import Place, place_of
from iobs_onnx.passes.files.ship import Shipment, pack, unpack
from iobs_onnx.passes.files.sizes import Sizes, model_sizes
from iobs_onnx.passes.graph.moving import moving_lengths
from iobs_onnx.passes.graph.tensors import Slot, release, stored_slots
from iobs_onnx.passes.sites.find_sites import find_sites
from iobs_onnx.passes.sites.others import count_parameters, find_others
from iobs_onnx.passes.sites.out_of_reach import outputs_out_of_reach
from iobs_onnx.passes.sites.positions import find_positions
from iobs_onnx.passes.sites.token_input import find_token_input
from iobs_onnx.passes.taps.expose import prepare
from iobs_onnx.passes.taps.halves import widen
from iobs_onnx.passes.taps.instrument import instrument
from iobs_onnx.passes.taps.partition import Segment, Sequential, partition

__all__ = [
    "Chain",
    "Codes",
    "Engine",
    "Place",
    "Segment",
    "Sequential",
    "Shipment",
    "Sizes",
    "Slot",
    "Surroundings",
    "Violation",
    "achieved_sparsity",
    "bound_changes",
    "bring_into_memory",
    "channel_axis",
    "check_model",
    "check_pattern",
    "count_parameters",
    "deployment_warnings",
    "eligibility_2_4",
    "engines_2_4",
    "find_chains",
    "find_others",
    "find_positions",
    "find_sites",
    "find_surroundings",
    "find_token_input",
    "foreign_operators",
    "instrument",
    "is_2_4",
    "load_model",
    "locked",
    "mask_file",
    "masks_of",
    "model_hash",
    "model_sizes",
    "moving_lengths",
    "outputs_out_of_reach",
    "pack",
    "partition",
    "permute_channels",
    "place_of",
    "prepare",
    "release",
    "replacing",
    "require_opset",
    "require_output",
    "rewrite",
    "rewrite_biases",
    "save_model",
    "saving",
    "scratch",
    "sparse_bytes",
    "store_as_integers",
    "store_sparsely",
    "stored_slots",
    "trtexec_command",
    "unknown_to_checker",
    "unpack",
    "why_not_integers",
    "widen",
    "working_in",
    "writing_to",
]
