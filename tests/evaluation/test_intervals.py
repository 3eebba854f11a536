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


def test_paired_interval_of_a_known_case():
    """12 of 40 for one side only, 4 for the other: (13 - 5) / 42, and 1.96 sqrt((18/42 - (8/42)^2) / 42) either way."""
    pairs = [(True, False)] * 12 + [(False, True)] * 4 + [(True, True)] * 14 + [(False, False)] * 10
    interval = paired_difference(*zip(*pairs, strict=True))
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.2, 0.0010, 0.3800), abs=5e-4)


def test_a_few_equal_answers_do_not_say_that_all_are():
    few, many = (paired_difference([True] * count, [True] * count) for count in (8, 500))
    assert (few.value, few.low, few.high) == pytest.approx((0, -0.277, 0.277), abs=5e-4)
    assert many.high < 0.01


def test_one_pair_that_differs_says_no_less_than_none():
    none = paired_difference([True] * 500, [True] * 500)
    one = paired_difference([True] * 500, [True] * 499 + [False])
    assert one.high > none.high
    assert one.high - one.low > none.high - none.low


def test_an_outcome_is_no_better_than_itself():
    outcome = Outcome(["a"] * 3, [True, False, True], [Statistics()] * 3, [False] * 3)
    assert outcome.over(outcome) == Interval(0, 0, 0)
    assert outcome.over(replace(outcome)).high > 0


def test_one_pair_says_nothing_of_the_others():
    interval = paired_difference([True], [False])
    assert (interval.value, interval.high) == (1, 1)
    assert interval.low < -0.5


def test_pairing_narrows_the_interval_of_answers_that_go_together():
    right = [True] * 80 + [False] * 20
    slightly_worse = [True] * 78 + [False] * 22
    shuffled = slightly_worse[50:] + slightly_worse[:50]
    together, apart = paired_difference(right, slightly_worse), paired_difference(right, shuffled)
    assert together.value == apart.value
    assert together.high - together.low < (apart.high - apart.low) / 2
