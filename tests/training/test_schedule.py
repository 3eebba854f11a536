from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fast_dllm.training.schedule import noise_seed, run_order


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
