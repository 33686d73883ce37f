"""Which 2:4 weights a deployment engine can use, and which it is likely to."""

from __future__ import annotations

from iobs_onnx.passes.ops.recurrent import RECURRENT
from iobs_onnx.site import Patches, Site, TransposedPatches

# TensorRT's dense kernels win below this many input or output channels (fp16 and int8).
_PICKED_ABOVE = 256
# cuSPARSELt takes matrices with both dimensions a multiple of this: fp16 and bf16, int8.
_CUSPARSELT = {False: 16, True: 32}


def eligibility_2_4(site: Site) -> tuple[bool, str]:
    """Say whether hardware can use a 2:4 pattern of this weight, with the rule that decides.

    Groups of four lie along the reduction axis for each output: consecutive inputs of a matrix,
    consecutive input channels at each kernel position of a convolution.
    """
    inputs, outputs = site.run, site.out_features * site.groups
    form = site.taps[0].form
    if site.op_type in RECURRENT:
        return False, f"no known engine uses 2:4 weights of {site.op_type}"
    if isinstance(form, TransposedPatches):
        return False, "no known engine uses 2:4 weights of transposed convolutions"
    is_conv = isinstance(form, Patches)
    along = "input channels at each kernel position" if is_conv else "inputs"
    if inputs % 4:
        return False, f"{inputs} {along} (axis {site.axis}) are not a multiple of 4"
    if site.groups > 1:
        hint = "grouped convolutions and batched products are seldom picked"
    elif min(inputs, outputs) > _PICKED_ABOVE:
        hint = f"likely picked in fp16 or int8: {inputs} in and {outputs} out exceed 256"
    else:
        hint = f"seldom picked: {inputs} in and {outputs} out do not both exceed 256"
    multiple = _CUSPARSELT[site.quantized is not None]
    if inputs % multiple or outputs % multiple:
        hint += f"; cuSPARSELt wants multiples of {multiple}"
    return True, f"{inputs} {along} (axis {site.axis}) are a multiple of 4; {hint}"
