"""Which masked tokens a step reveals."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_dllm.decoding.policy import PolicyParameters, select

INF = float("inf")


def revealed(confidence, masked=None, *, threshold=INF, at_least=1, factor=0.0):
    row = np.array([confidence])
    hidden = np.ones(row.shape, dtype=bool) if masked is None else np.array([masked])
    parameters = PolicyParameters(np.array([[threshold]]), np.array([[at_least]]), np.array([[factor]]))
    return select(row, hidden, parameters)[0].nonzero()[0].tolist()


def test_threshold_excludes_equality():
    assert revealed([0.95, 0.9, 0.91], threshold=0.9) == [0, 2]


def test_threshold_reveals_regardless_of_order():
    assert revealed([0.1, 0.99, 0.2, 0.98], threshold=0.5) == [1, 3]


def test_most_confident_is_always_revealed():
    assert revealed([0.1, 0.3, 0.2], threshold=0.9) == [1]
    assert revealed([0.1, 0.3, 0.2], factor=0.0) == [1]


def test_lowest_position_wins_ties():
    assert revealed([0.2, 0.5, 0.5, 0.5], threshold=0.9) == [1]
    assert revealed([0.5, 0.2, 0.5, 0.5], at_least=2) == [0, 2]


def test_threshold_of_one_reveals_a_single_token_even_when_all_are_certain():
    assert revealed([1.0, 1.0, 1.0], threshold=1.0) == [0]


def test_factor_picks_the_largest_n_within_the_bound():
    # (n + 1)(1 - c(n)): 0.2, 0.3, 0.4, 1.0.
    assert revealed([0.9, 0.9, 0.8, 0.9], factor=0.25) == [0]
    assert revealed([0.9, 0.9, 0.8, 0.9], factor=0.35) == [0, 1]
    assert revealed([0.9, 0.9, 0.8, 0.9], factor=0.45) == [0, 1, 3]
    assert revealed([0.9, 0.9, 0.8, 0.9], factor=1.05) == [0, 1, 2, 3]


def test_factor_excludes_equality():
    # n = 1: 2 * (1 - 0.75) = 0.5; exact in binary.
    assert revealed([0.75, 0.75], factor=0.75) == [0]
    assert revealed([0.75, 0.75], factor=0.8) == [0, 1]


def test_fixed_reveals_n_tokens_or_all_that_are_left():
    assert revealed([0.3, 0.1, 0.2], at_least=2) == [0, 2]
    assert revealed([0.3, 0.1, 0.2], at_least=9) == [0, 1, 2]
    assert revealed([0.3, 0.1, 0.2], [False, True, True], at_least=9) == [1, 2]


def test_never_reveals_what_is_not_masked():
    assert revealed([0.99, 0.5, 0.98], [False, True, False], threshold=0.1) == [1]


def test_row_without_masks_reveals_nothing():
    assert revealed([0.99, 0.5], [False, False], threshold=0.1) == []
    assert revealed([0.99, 0.5], [False, False], at_least=2, factor=100.0) == []


def naive(confidence, masked, threshold, at_least, factor):
    order = sorted((i for i, m in enumerate(masked) if m), key=lambda i: (-confidence[i], i))
    largest = max((n for n, i in enumerate(order, 1) if (n + 1) * (1 - confidence[i]) < factor), default=0)
    chosen = set(order[: max(1, at_least, largest)])
    return sorted(chosen | {i for i in order if confidence[i] > threshold})


GRID = st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.875, 1.0])
ROWS = st.lists(
    st.tuples(
        st.lists(st.tuples(GRID, st.booleans()), min_size=8, max_size=8),
        st.sampled_from([0.0, 0.5, 0.75, 1.0, INF]),
        st.integers(1, 5),
        st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    ),
    min_size=1,
    max_size=4,
)


def table(rows):
    """Confidences and masks of the rows, and their thresholds, counts and factors."""
    confidence = np.array([[c for c, _ in row] for row, *_ in rows])
    masked = np.array([[m for _, m in row] for row, *_ in rows])
    return confidence, masked, *(np.array([[row[i]] for row in rows]) for i in (1, 2, 3))


@settings(max_examples=300)
@given(ROWS)
def test_rows_of_mixed_policies_each_follow_their_own(rows):
    confidence, masked, *bounds = table(rows)
    chosen = select(confidence, masked, PolicyParameters(*bounds))
    assert not (chosen & ~masked).any()
    for r, (_, threshold, at_least, factor) in enumerate(rows):
        expected = naive(confidence[r].tolist(), masked[r].tolist(), threshold, at_least, factor)
        assert chosen[r].nonzero()[0].tolist() == expected


@given(ROWS, st.booleans(), st.booleans())
def test_bound_that_no_row_uses_may_be_left_out(rows, counted, bounded):
    confidence, masked, threshold, at_least, factor = table(rows)
    at_least = at_least if counted else np.ones_like(at_least)
    factor = factor if bounded else np.zeros_like(factor)
    short = PolicyParameters(threshold, at_least if counted else None, factor if bounded else None)
    whole = PolicyParameters(threshold, at_least, factor)
    assert (select(confidence, masked, short) == select(confidence, masked, whole)).all()
