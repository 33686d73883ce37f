"""Which 2:4 weights a deployment engine can use, and which it is likely to."""

from __future__ import annotations

from iobs_onnx.site import Patches, Site

# TensorRT's dense kernels win below this many input or output channels (fp16 and int8).
_PICKED_ABOVE = 256
# cuSPARSELt takes fp16 and bf16 matrices with both dimensions a multiple of this.
_CUSPARSELT = 16


def eligibility_2_4(site: Site) -> tuple[bool, str]:
    """Say whether hardware can use a 2:4 pattern of this weight, with the rule that decides.

    Groups of four lie along the reduction axis for each output: consecutive inputs of a matrix,
    consecutive input channels at each kernel position of a convolution.
    """
    inputs, outputs = site.run, site.out_features * site.groups
    is_conv = isinstance(site.taps[0].form, Patches)
    along = "input channels at each kernel position" if is_conv else "inputs"
    if inputs % 4:
        return False, f"{inputs} {along} (axis {site.axis}) are not a multiple of 4"
    if site.groups > 1:
        hint = "grouped convolutions are seldom picked"
    elif min(inputs, outputs) > _PICKED_ABOVE:
        hint = f"likely picked in fp16 or int8: {inputs} in and {outputs} out exceed 256"
    else:
        hint = f"seldom picked: {inputs} in and {outputs} out do not both exceed 256"
    if inputs % _CUSPARSELT or outputs % _CUSPARSELT:
        hint += "; cuSPARSELt wants multiples of 16"
    return True, f"{inputs} {along} (axis {site.axis}) are a multiple of 4; {hint}"
