"""Contestants take turns, and medians are medians."""

import pytest

from fast_dllm.bench.findings import CHECKED_KEYS, BenchResult, Findings
from fast_dllm.bench.timing import WARM_UP, alternate, paired_ratios
from fast_dllm.spread import spread


def called_by_alternate(names, repetitions):
    calls = []
    contestants = {name: lambda repetition, name=name: calls.append((repetition, name)) for name in names}
    alternate(contestants, repetitions, pause_s=0)
    return calls


def test_every_contestant_runs_once_in_every_repetition():
    calls = called_by_alternate("abc", 4)
    for start in range(0, len(calls), 3):
        repetition = start // 3 + WARM_UP
        assert sorted(calls[start : start + 3]) == [(repetition, name) for name in "abc"]
    assert len(calls) == 3 * 5


def test_each_contestant_is_first_in_some_repetition():
    calls = called_by_alternate("abc", 3)
    assert {name for _, name in calls[3::3]} == set("abc")


def test_warm_up_is_not_counted():
    timed = alternate({"a": lambda repetition: repetition}, 3, pause_s=0)
    assert [one.result for one in timed["a"]] == [0, 1, 2]


def test_on_call_is_told_of_every_call():
    told = []
    alternate({"a": id, "b": id}, 2, on_call=lambda: told.append(1), pause_s=0)
    assert len(told) == 6


def test_seconds_belong_to_the_contestant():
    def sleep(_):
        import time

        time.sleep(0.02)

    timed = alternate({"slow": sleep, "fast": id}, 3, pause_s=0)
    assert all(one.seconds >= 0.02 for one in timed["slow"])
    assert spread([one.seconds for one in timed["fast"]]).median < 0.02


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.0], (3, 3, 3)), ([1.0, 3.0], (2, 1.5, 2.5)), ([5.0, 1.0, 2.0, 4.0, 3.0], (3, 2, 4))],
)
def test_spread_is_median_and_quartiles(values, expected):
    found = spread(values)
    assert (found.median, found.low, found.high) == expected


def test_one_wild_value_does_not_move_the_median():
    assert spread([1.0, 1.0, 1.0, 1.0, 900.0]).median == 1.0


def test_ratios_are_taken_within_a_repetition():
    # The machine was four times slower in the second repetition; the ratio does not see it.
    assert paired_ratios([10.0, 2.5], [5.0, 1.25]) == [2.0, 2.0]


def test_a_record_holds_median_spread_and_what_it_is_about():
    findings = Findings()
    findings.add("speed", [1.0, 2.0, 3.0], dtype="float32", threshold=0.9, peer="p")
    assert findings.records["speed"] == [
        {
            "value": 2.0,
            "spread": [1.5, 2.5],
            "repetitions": 3,
            "batch": 1,
            "threshold": 0.9,
            "dtype": "float32",
            "accuracy": None,
            "peer": "p",
        }
    ]


def test_checked_keys_are_there_when_nothing_was_measured():
    made = BenchResult({}, {}, [], 0.0).to_dict()
    assert all(made[key] == [] for key in CHECKED_KEYS)


def test_what_is_missing_is_named_once_and_on_one_line():
    findings = Findings()
    for _ in range(2):
        findings.skip("peer", ValueError("broken\n  here"))
    assert findings.not_measured == [{"what": "peer", "why": "broken here"}]
