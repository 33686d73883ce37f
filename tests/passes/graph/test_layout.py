"""Layouts against NumPy: the same elements in the same places."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from iobs_onnx.passes.graph.layout import Layout


def divisors_of(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def shapes_of(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    shape = []
    while size > 1 and len(shape) < 4:
        shape.append(draw(st.sampled_from(divisors_of(size))))
        size //= shape[-1]
    return (*shape, size)


@st.composite
def chains(draw: st.DrawFn):
    size = draw(st.sampled_from([1, 6, 8, 12, 24, 30, 36]))
    start = draw(shapes_of(size))
    steps = []
    shape = start
    for _ in range(draw(st.integers(0, 5))):
        if draw(st.booleans()):
            order = draw(st.permutations(range(len(shape))))
            steps.append(("transpose", order))
            shape = tuple(shape[axis] for axis in order)
        else:
            shape = draw(shapes_of(size))
            steps.append(("reshape", shape))
    return start, steps


@given(chains())
def test_layout_is_that_of_the_array(chain):
    start, steps = chain
    stored = np.arange(np.prod(start)).reshape(start)
    array, layout = stored, Layout.of(start)
    for name, argument in steps:
        moved = getattr(layout, name)(argument)
        if moved is None:
            # Refused only where the axes of the result mix parts of others: NumPy must copy.
            array = array.reshape(argument)
            assert not np.shares_memory(array, stored)
            return
        array, layout = getattr(array, name)(argument), moved
        assert layout.shape == array.shape
        view, perm = layout.view()
        found = stored.reshape(view).transpose(perm).reshape(array.shape)
        np.testing.assert_array_equal(found, array)
        again, order = layout.simplest().view()
        found = stored.reshape(again).transpose(order).reshape(array.shape)
        np.testing.assert_array_equal(found, array)


def test_split_and_join():
    stored = np.arange(24).reshape(6, 4)
    split = Layout.of((6, 4)).split(0, 2)
    assert split is not None
    matrices = split.join((0,), (2,), (1,))
    view, perm = matrices.view()
    found = stored.reshape(view).transpose(perm).reshape(matrices.shape)
    np.testing.assert_array_equal(found, stored.reshape(2, 3, 4).transpose(0, 2, 1))


def test_a_shape_of_another_size_does_not_fit():
    assert Layout.of((6, 4)).reshape((5, 5)) is None
