"""Patterns against sorting, on every group size, memory layout and kind of tie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from iobs_onnx.errors import OptionError
from iobs_onnx.sparsity import NM, Unstructured, parse_sparsity, top_mask

# Few values, so that ties are the rule.
SCORES = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 4)).map(lambda s: (s[0], s[1] * 24)),
    elements=st.sampled_from([0.0, 0.5, 1.0, 2.0, float("inf")]),
)


def reference(row: np.ndarray, keep: int) -> np.ndarray:
    """The largest, of equals the first, by a stable sort."""
    mask = np.zeros(len(row), bool)
    mask[sorted(range(len(row)), key=lambda i: (-row[i], i))[:keep]] = True
    return mask


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        (" 1 : 32 ", NM(1, 32)),
        ("4:4", NM(4, 4)),
        ("0.7", Unstructured(0.7)),
        (".5", Unstructured(0.5)),
        ("70%", Unstructured(0.7)),
        ("12.5 %", Unstructured(0.125)),
        ("0", Unstructured(0.0)),
        (0.25, Unstructured(0.25)),
        (0, Unstructured(0.0)),
        (NM(3, 8), NM(3, 8)),
        (Unstructured(0.1), Unstructured(0.1)),
    ],
)
def test_parse(text: str | float, pattern: NM | Unstructured) -> None:
    assert parse_sparsity(text) == pattern


@pytest.mark.parametrize(
    "text",
    [
        *("", "two:four", "2:4:8", "0:4", "5:4", "-1:4", "2:", "1.0", "100%", "150%", "-0.1"),
        *("0.7x", "nan", "inf", "1e-1", 1, -0.5, float("nan"), float("inf")),
    ],
)
def test_parse_refuses(text: str | float) -> None:
    with pytest.raises(OptionError, match="sparsity "):
        parse_sparsity(text)


@pytest.mark.parametrize("text", ["60", 60, 60.0])
def test_a_percentage_without_its_sign_is_asked_back(text: str | float) -> None:
    with pytest.raises(OptionError, match=r"sparsity 60: .* for a percentage write 60%"):
        parse_sparsity(text)


@given(st.one_of(st.builds(lambda n, d: NM(n, n + d), st.integers(1, 64), st.integers(0, 64))))
def test_parse_reads_what_is_written(pattern: NM) -> None:
    assert parse_sparsity(str(pattern)) == pattern
    assert pattern.density == pattern.n / pattern.m


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 10**7))
def test_budget_is_the_rounded_fraction(fraction: float, size: int) -> None:
    keep = Unstructured(fraction).keep(size)
    assert 0 <= keep <= size
    assert abs((size - keep) - fraction * size) <= 0.5 + 1e-6


@pytest.mark.parametrize("m", range(2, 33))
def test_groups_of_every_size(m: int) -> None:
    generator = np.random.default_rng(m)
    # Whole numbers: many ties within each group.
    scores = generator.integers(0, m, (6, 5 * m)).astype(np.float32)
    for n in {1, m // 2, m - 1, m}:
        mask = NM(n, m).project(torch.from_numpy(scores)).numpy()
        expected = np.stack(
            [np.concatenate([reference(g, n) for g in row.reshape(-1, m)]) for row in scores]
        )
        assert np.array_equal(mask, expected)


@settings(deadline=None, max_examples=60)
@given(SCORES, st.sampled_from([(1, 2), (2, 4), (2, 3), (3, 8), (5, 24), (1, 24)]))
def test_group_projection_of_ties(scores: np.ndarray, pair: tuple[int, int]) -> None:
    pattern = NM(*pair)
    mask = pattern.project(torch.from_numpy(scores)).numpy()
    groups, kept = scores.reshape(-1, pattern.m), mask.reshape(-1, pattern.m)
    for group, found in zip(groups, kept, strict=True):
        assert np.array_equal(found, reference(group, pattern.n))


@settings(deadline=None, max_examples=60)
@given(SCORES, st.floats(0, 1, exclude_max=True))
def test_whole_matrix_projection_of_ties(scores: np.ndarray, fraction: float) -> None:
    pattern = Unstructured(fraction)
    mask = pattern.project(torch.from_numpy(scores)).numpy()
    expected = reference(scores.ravel(), pattern.keep(scores.size)).reshape(scores.shape)
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 24), Unstructured(0.6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_memory_layout_does_not_matter(pattern: NM | Unstructured, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (10, 48), generator=generator).to(dtype)
    expected = pattern.project(scores)
    transposed = scores.T.contiguous().T
    wide = torch.zeros(20, 96, dtype=dtype)
    wide[::2, ::2] = scores
    for other in (transposed, wide[::2, ::2]):
        assert not other.is_contiguous()
        found = pattern.project(other)
        assert torch.equal(found, expected)
    assert pattern.project(transposed).stride() == transposed.stride()
    assert torch.equal(scores, torch.as_tensor(wide[::2, ::2]))


def test_more_dimensions() -> None:
    scores = torch.rand(3, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = NM(2, 4).project(scores)
    assert torch.equal(mask[1], NM(2, 4).project(scores[1]))


def test_top_mask_at_its_ends() -> None:
    scores = torch.tensor([[1.0, 2.0], [2.0, 0.0]])
    assert not bool(top_mask(scores, 0).any())
    assert bool(top_mask(scores, 4).all())
    assert top_mask(scores, 1).tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize(
    ("pattern", "run", "fits"),
    [(NM(2, 4), 8, True), (NM(2, 4), 6, False), (NM(1, 7), 49, True), (Unstructured(0.5), 3, True)],
)
def test_misfit_says_why(pattern: NM | Unstructured, run: int, fits: bool) -> None:
    reason = pattern.misfit(run)
    assert (reason is None) == fits
    if reason is not None:
        assert str(run) in reason


def test_violations_are_counted() -> None:
    matrix = np.ones((2, 3, 8), np.float32)
    assert NM(2, 4).violations(matrix) == 12
    assert NM(4, 4).violations(matrix) == 0
    matrix[0, 0, :2] = 0.0
    assert NM(2, 4).violations(matrix) == 11
    assert Unstructured(0.5).violations(matrix) == 48 - 2 - 24
    assert Unstructured(0.0).violations(matrix) == 0


@settings(deadline=None, max_examples=40)
@given(SCORES)
def test_what_is_projected_has_no_violation(scores: np.ndarray) -> None:
    for pattern in (NM(1, 4), NM(5, 8), Unstructured(0.3), Unstructured(0.99)):
        mask = pattern.project(torch.from_numpy(scores)).numpy()
        assert pattern.violations(mask.astype(np.float32)) == 0
