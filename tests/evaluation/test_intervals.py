"""Intervals of shares."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_dllm.decoding.events import Statistics
from fast_dllm.evaluation.intervals import Interval, paired_difference, share
from fast_dllm.evaluation.outcome import Outcome


def test_wilson_interval_of_a_known_case():
    """8 of 10: Agresti and Coull (1998) give 0.490 to 0.943."""
    interval = share(8, 10)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.8, 0.490, 0.943), abs=5e-4)


@given(st.integers(1, 2000), st.data())
def test_a_share_lies_inside_its_interval_inside_zero_and_one(asked, data):
    interval = share(data.draw(st.integers(0, asked)), asked)
    assert 0 <= interval.low <= interval.value <= interval.high <= 1


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=200))
def test_difference_of_pairs_is_the_difference_of_shares_and_changes_sign_with_its_sides(pairs):
    first, second = zip(*pairs, strict=True)
    forth, back = paired_difference(first, second), paired_difference(second, first)
    assert forth.value == pytest.approx(sum(first) / len(first) - sum(second) / len(second))
    assert (forth.value, forth.low, forth.high) == pytest.approx((-back.value, -back.high, -back.low))


def test_a_few_equal_answers_do_not_say_that_all_are():
    """None of 8 differs: Clopper and Pearson (1934) give a share of up to 0.369."""
    interval = paired_difference([True] * 8, [True] * 8)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0, -0.369, 0.369), abs=5e-4)
    assert paired_difference([True] * 500, [True] * 500).high < 0.01


def test_an_outcome_is_no_better_than_itself():
    outcome = Outcome(["a"] * 3, [True, False, True], [Statistics()] * 3)
    assert outcome.over(outcome) == Interval(0, 0, 0)
    assert outcome.over(replace(outcome)).high > 0


def test_one_pair_says_nothing_of_the_others():
    interval = paired_difference([True], [False])
    assert (interval.value, interval.low, interval.high) == (1, -1, 1)


def test_pairing_narrows_the_interval_of_answers_that_go_together():
    right = [True] * 80 + [False] * 20
    slightly_worse = [True] * 78 + [False] * 22
    shuffled = slightly_worse[50:] + slightly_worse[:50]
    together, apart = paired_difference(right, slightly_worse), paired_difference(right, shuffled)
    assert together.value == apart.value
    assert together.high - together.low < (apart.high - apart.low) / 2
