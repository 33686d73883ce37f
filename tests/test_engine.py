"""Memory of the process, which neighbours of this test may not see changed."""

from __future__ import annotations

import resource

import pytest
import torch

from iobs_onnx.engine import _allocator, kept_memory


def faults() -> int:
    """Pages that the system had to map while 64 MB were taken and freed eight times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(_allocator() is None, reason="only glibc maps large blocks anew each time")
def test_memory_is_mapped_once_within_and_each_time_outside() -> None:
    outside = faults()
    with kept_memory():
        torch.ones(1 << 24)
        within = faults()
    assert within < outside / 4
    assert faults() > 4 * within
