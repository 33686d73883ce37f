import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from iobs_onnx.errors import DataError
from iobs_onnx.hessian import (
    Cross,
    Hessian,
    combine,
    dead_inputs,
    exact_float32,
)
from iobs_onnx.runtime.sums import CrossAccumulator, GramAccumulator


def reference(rows):
    rows = rows.astype(np.float64)
    return rows.T @ rows / len(rows)


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("features", [1, 5, 128, 130, 1100])
def test_equals_float64_and_is_symmetric(features):
    rows = np.random.default_rng(0).standard_normal((700, features)).astype(np.float32)
    sums = GramAccumulator(features)
    for part in np.array_split(rows, 3):
        sums.add(torch.from_numpy(part))
    hessian = sums.finish()
    assert hessian.rows == 700
    assert hessian.matrix.shape == (1, features, features)
    assert hessian.matrix.dtype == torch.float32
    assert torch.equal(hessian.matrix, hessian.matrix.mT)
    assert relative(hessian.matrix[0].numpy(), reference(rows)) < 1e-5


def test_groups_are_independent():
    rows = np.random.default_rng(1).standard_normal((3, 50, 200)).astype(np.float32)
    sums = GramAccumulator(200, groups=3)
    sums.add(torch.from_numpy(rows))
    matrix = sums.finish().matrix.numpy()
    for group in range(3):
        assert relative(matrix[group], reference(rows[group])) < 1e-5


@pytest.mark.parametrize(
    ("batches", "rows", "offset"), [(12000, 17, 1000.1), (40, 20000, 1000.1), (300, 100, 0.0)]
)
def test_many_batches_with_a_large_offset(batches, rows, offset):
    # Without float64 sums the first case loses 4e-5.
    rng = np.random.default_rng(2)
    block = (rng.standard_normal((rows, 8)) + offset).astype(np.float32)
    sums = GramAccumulator(8)
    for _ in range(batches):
        sums.add(torch.from_numpy(block))
    hessian = sums.finish()
    assert hessian.rows == batches * rows
    assert relative(hessian.matrix[0].numpy(), reference(block)) < 1e-5


def test_constant_data_keep_their_precision():
    sums = GramAccumulator(4)
    block = torch.full((100_000, 4), 1000.1)
    for _ in range(5):
        sums.add(block)
    assert relative(sums.finish().matrix[0].numpy(), reference(block[:1].numpy())) < 1e-5


@pytest.fixture
def sequential_blas(monkeypatch):
    """Products that add their rows one after the other in float32: the worst order allowed."""

    def chain(total, left, right):
        for i in range(left.shape[-1]):
            total += left[..., :, i, None] * right[..., None, i, :]
        return total

    def bmm(left, right, *, out):
        return chain(out.zero_(), left, right)

    monkeypatch.setattr(torch, "bmm", bmm)
    monkeypatch.setattr(torch.Tensor, "baddbmm_", chain)


@pytest.mark.usefixtures("sequential_blas")
# 1.4 squared is just below 2, where an addition to a power of two rounds by the most.
@pytest.mark.parametrize("constant", [1000.1, 1.4, 1.42])
def test_the_order_in_which_a_blas_adds_does_not_matter(constant):
    block = torch.full((70_000, 3), constant)
    sums, crossed = GramAccumulator(3), CrossAccumulator(3, 3)
    sums.add(block)
    crossed.add(block, block)
    expected = reference(block[:1].numpy())
    assert relative(sums.finish().matrix[0].numpy(), expected) < 1e-5
    assert relative(crossed.finish().matrix[0].numpy(), expected) < 1e-5


def test_float16_rows_are_summed_in_float32():
    # Sums in float16 would be off by 1e-3.
    rows = (np.random.default_rng(3).standard_normal((5000, 6)) * 20).astype(np.float16)
    sums = GramAccumulator(6)
    sums.add(torch.from_numpy(rows))
    assert relative(sums.finish().matrix[0].numpy(), reference(rows)) < 1e-5


def test_parts_add_up_to_the_whole():
    rows = torch.from_numpy(np.random.default_rng(4).standard_normal((90, 400)).astype(np.float32))
    whole, split = GramAccumulator(400), GramAccumulator(400)
    whole.add(rows)
    assert split.parts == 4
    for part in range(3):
        split.add(rows, part=part, parts=3)
    assert split.rows == 90
    assert torch.equal(whole.finish().matrix, split.finish().matrix)


@pytest.mark.parametrize("products", [1, 70])  # the sum of a shard is float32, or float64
def test_sums_that_were_sent_add_up_to_the_same_and_stay_what_they_are(products):
    """Where they were sent without a copy they lie in memory that must not be written to."""
    rng = np.random.default_rng(5)
    rows = [torch.from_numpy(rng.standard_normal((512, 3), np.float32)) for _ in range(3)]
    here, parts, held = GramAccumulator(3), [], []
    for shard in rows:
        there = GramAccumulator(3)
        for _ in range(products):
            here.add(shard)
            there.add(shard)
        here.seal()
        there.seal()
        buffers = []
        sent = pickle.dumps(there, protocol=5, buffer_callback=buffers.append)
        held.append([bytes(buffer) for buffer in buffers])
        parts.append(pickle.loads(sent, buffers=held[-1]))
    before = [b"".join(each) for each in held]
    assert all(before)
    first, *others = parts
    for other in others:
        first.merge(other)
    assert torch.equal(first.finish().matrix, here.finish().matrix)
    assert [b"".join(each) for each in held] == before


def test_added_rows_are_not_changed():
    rows = torch.randn(10, 4)
    before = rows.clone()
    GramAccumulator(4).add(rows)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("later", [0, 200])
def test_finite_sees_what_is_not(bad, later):
    sums = GramAccumulator(200)
    sums.add(torch.ones(3, 200))
    assert sums.finite()
    row = torch.ones(1, 200)
    row[0, 150] = bad
    sums.add(row)
    for _ in range(later):  # past the move to float64
        sums.add(torch.ones(1, 200))
    assert not sums.finite()
    assert sums.finite(0, 2)  # the first strip does not hold input 150
    assert not sums.finite(1, 2)


def test_no_rows():
    sums = GramAccumulator(3)
    sums.add(torch.empty(0, 3))
    with pytest.raises(DataError, match="no rows"):
        sums.finish()


def test_combine_weighs_by_rows():
    rows = np.random.default_rng(5).standard_normal((60, 7)).astype(np.float32)
    hessians = []
    for part in (rows[:13], rows[13:]):
        sums = GramAccumulator(7)
        sums.add(torch.from_numpy(part))
        hessians.append(sums.finish())
    both = combine(hessians)
    assert both.rows == 60
    assert relative(both.matrix[0].numpy(), reference(rows)) < 1e-5
    assert combine(hessians[:1]) is hessians[0]


def test_cross_products_and_means_equal_float64():
    rng = np.random.default_rng(6)
    rows = (rng.standard_normal((5000, 150)) + 3).astype(np.float32)
    left = (1e-3 * rng.standard_normal((5000, 70))).astype(np.float32)
    sums = CrossAccumulator(70, 150)
    for chunk in np.split(np.arange(5000), 4):
        for part in range(2):
            arguments = torch.from_numpy(left[chunk]), torch.from_numpy(rows[chunk])
            sums.add(*arguments, part=part, parts=2)
    cross = sums.finish()
    assert relative(cross.matrix[0].numpy(), left.astype(np.float64).T @ rows / 5000) < 1e-5
    assert relative(cross.mean[0].numpy(), left.mean(0, dtype=np.float64)) < 1e-5


def test_a_row_of_weight_three_counts_three_times():
    rng = np.random.default_rng(8)
    rows, left = (torch.from_numpy(rng.standard_normal((9, 5)).astype("f")) for _ in range(2))
    weighted, repeated = GramAccumulator(5), GramAccumulator(5)
    crossed, again = CrossAccumulator(5, 5), CrossAccumulator(5, 5)
    for once, times in ((rows[:4], 1), (rows[4:], 3)):
        weighted.add(once, times)
        repeated.add(once.repeat(times, 1))
    for once, other, times in ((rows[:4], left[:4], 1), (rows[4:], left[4:], 3)):
        crossed.add(other, once, times)
        again.add(other.repeat(times, 1), once.repeat(times, 1))
    found, expected = weighted.finish(), repeated.finish()
    assert found.rows == 9
    torch.testing.assert_close(found.matrix, expected.matrix)
    torch.testing.assert_close(found.mean, expected.mean)
    cross, whole = crossed.finish(), again.finish()
    torch.testing.assert_close(cross.matrix, whole.matrix)
    torch.testing.assert_close(cross.mean, whole.mean)


def test_combine_takes_an_absent_drift_for_none():
    rows = np.random.default_rng(7).standard_normal((30, 5)).astype(np.float32)
    first, second = GramAccumulator(5), GramAccumulator(5)
    first.add(torch.from_numpy(rows[:10]))
    second.add(torch.from_numpy(rows[10:]))
    drift = Cross(torch.ones(1, 5, 5), torch.ones(1, 5))
    both = combine([first.finish(), replace(second.finish(), drift=drift)])
    assert both.drift is not None
    torch.testing.assert_close(both.drift.matrix, torch.full((1, 5, 5), 2 / 3))
    torch.testing.assert_close(both.drift.mean, torch.full((1, 5), 2 / 3))
    assert relative(both.mean[0].numpy(), rows.mean(0, dtype=np.float64)) < 1e-5


def test_dead_inputs():
    matrix = torch.diag(torch.tensor([1.0, 0.0, 2.0]))[None]
    hessian = Hessian(matrix, 4, 4.0, torch.zeros(1, 3))
    assert dead_inputs(hessian.matrix).tolist() == [[False, True, False]]


def test_exact_float32_restores_the_choice():
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with exact_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(chosen)
