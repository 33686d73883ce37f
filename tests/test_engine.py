"""Memory of the process, which neighbours of this test may not see changed."""

from __future__ import annotations

import resource

import pytest

from iobs_onnx.engine import _allocator, kept_memory


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
