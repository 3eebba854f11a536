import hashlib
import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_dllm.errors import FastDLLMError
from fast_dllm.training.schedule import WINDOW, RunDataset, in_order, noise_seed, run_order


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=200),
    total=st.integers(1, 500),
    batch=st.integers(1, 16),
    seed=st.integers(0, 5),
)
def test_order_is_reproducible_and_a_prefix_of_a_longer_run(lengths, total, batch, seed):
    order = run_order(lengths, total, batch, seed)
    assert len(order) == total
    assert order == run_order(lengths, total + 50, batch, seed)[:total]


@given(rows=st.integers(1, 100), batch=st.integers(1, 8), seed=st.integers(0, 5))
def test_an_epoch_repeats_no_row(rows, batch, seed):
    epoch = rows // batch * batch if rows > batch else rows
    assert max(Counter(run_order(list(range(rows)), epoch, batch, seed)).values()) == 1


def test_rows_of_a_batch_are_of_like_length():
    lengths = list(range(640))
    order = run_order(lengths, 640, 8, seed=0)
    spreads = [max(order[i : i + 8]) - min(order[i : i + 8]) for i in range(0, 640, 8)]
    assert sum(spreads) / len(spreads) < 100


def test_noise_seeds_differ_between_places_and_runs():
    seeds = {noise_seed(seed, place) for seed in range(20) for place in range(1000)}
    assert len(seeds) == 20_000


def test_the_order_is_that_of_every_run_so_far():
    lengths = [(7919 * i) % 500 + 1 for i in range(1000)]
    orders = json.dumps([run_order(lengths, 2500, batch, seed=3) for batch in (1, 8, 48)])
    recorded = "c6d81138a86d4a9bbdaec6bfaf4b71763757a4b614e90401393af4bbf181394b"
    assert hashlib.sha256(orders.encode()).hexdigest() == recorded


@given(rows=st.integers(1, 700), batch=st.integers(1, 8), seed=st.integers(0, 5))
def test_rows_that_come_are_ordered_within_one_window(rows, batch, seed):
    asked = 0

    def come(epoch, _):
        nonlocal asked
        for row in range(rows):
            asked += 1
            yield epoch, row

    whole = rows // batch * batch if rows > batch else rows
    order = in_order(come, lambda row: row[1] % 7, batch, seed)
    for epoch in range(2):
        asked, seen = 0, set()
        for number, row in enumerate(islice(order, whole)):
            assert asked <= (number // (WINDOW * batch) + 1) * WINDOW * batch
            seen.add(row)
        assert len(seen) == whole
        assert {number for number, _ in seen} == {epoch}


def test_an_epoch_without_rows_is_an_error():
    with pytest.raises(FastDLLMError, match="no sample has a response token"):
        next(in_order(lambda epoch, _: iter(()), len, 4, 0))


def test_a_place_of_a_run_is_the_same_whoever_asks_and_when():
    dataset = RunDataset(lambda: iter(range(100, 200)), 50)
    assert len(dataset) == 50
    assert [dataset[place] for place in (0, 1, 5, 5, 49, 3, 4)] == [(n, 100 + n) for n in (0, 1, 5, 5, 49, 3, 4)]
