"""Memory: kept in the process, where neighbours of this test may not see it changed, and full."""

from __future__ import annotations

import resource

import pytest
import torch

from iobs_onnx.engine import _allocator, kept_memory, memory_faults
from iobs_onnx.errors import OptionError


def faults() -> int:
    """Pages that the system had to map for this thread, which took and freed 64 MB eight times."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(8):
        _take()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def _take() -> None:
    assert len(b"x" * (1 << 26)) == 1 << 26


@pytest.mark.skipif(_allocator() is None, reason="only glibc maps large blocks anew each time")
def test_memory_is_mapped_once_within_and_each_time_outside() -> None:
    outside = faults()
    with kept_memory():
        _take()
        within = faults()
    assert within < outside / 4
    assert faults() > 4 * within


def test_memory_that_is_full_is_one_line_and_other_faults_stay() -> None:
    for fault in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    ):
        with (
            pytest.raises(OptionError, match=r"^device cuda: out of memory; use --device cpu$"),
            memory_faults("device cuda", "use --device cpu"),
        ):
            raise fault
    with pytest.raises(RuntimeError, match="a defect"), memory_faults("device cuda", "none"):
        raise RuntimeError("a defect")
