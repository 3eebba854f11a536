import json
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_dllm.data.build import gather_conversations, render_conversations, stream_documents
from fast_dllm.data.mixture import mix, shuffled
from fast_dllm.data.sources import BadRows
from fast_dllm.errors import FastDLLMError
from tiny_tokenizers import MISTRAL, byte_level

sizes = st.lists(st.integers(1, 30), min_size=1, max_size=4)


def sources(counts):
    return [partial(lambda name, count: ((name, n) for n in range(count)), name, count) for name, count in counts]


@given(sizes, st.integers(0, 5))
def test_without_weights_each_row_comes_once_and_in_its_sources_order(counts, seed):
    drawn = list(mix(sources(enumerate(counts)), seed=seed))
    assert sorted(drawn) == [(name, n) for name, count in enumerate(counts) for n in range(count)]
    for name, count in enumerate(counts):
        assert [n for source, n in drawn if source == name] == list(range(count))


@given(sizes, st.integers(0, 5), st.data())
def test_with_weights_every_source_is_given_whole_and_begins_again(counts, seed, data):
    weights = [data.draw(st.floats(0.2, 5)) for _ in counts]
    drawn = list(mix(sources(enumerate(counts)), weights, seed=seed))
    for name, count in enumerate(counts):
        own = [n for source, n in drawn if source == name]
        assert own == [place % count for place in range(len(own))]
        assert len(own) >= count
    # It ends with the last row of a source that had not been given whole before.
    name, row = drawn[-1]
    assert row == counts[name] - 1
    assert drawn.count(drawn[-1]) == 1


def test_shares_are_those_of_the_weights():
    drawn = Counter(name for name, _ in islice(mix(sources([("a", 4000), ("b", 100)]), [3, 1], seed=0), 4000))
    assert drawn["a"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_draws_and_shuffles_are_functions_of_the_seed():
    both = sources([("a", 50), ("b", 50)])
    assert list(mix(both, [1, 2], seed=3)) == list(mix(both, [1, 2], seed=3))
    assert list(mix(both, [1, 2], seed=3)) != list(mix(both, [1, 2], seed=4))
    assert list(shuffled(range(50), 8, seed=3)) == list(shuffled(range(50), 8, seed=3))
    assert list(shuffled(range(50), 8, seed=3)) != list(shuffled(range(50), 8, seed=4))


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 3))
def test_shuffling_loses_nothing_and_holds_no_more_than_its_buffer(count, buffer_size, seed):
    read = 0

    def rows():
        nonlocal read
        for row in range(count):
            read += 1
            yield row

    seen = []
    for row in shuffled(rows(), buffer_size, seed=seed):
        seen.append(row)
        assert read - len(seen) <= buffer_size
    assert sorted(seen) == list(range(count))


@pytest.fixture
def files(tmp_path):
    """Two files, of 100 and 20 conversations."""

    def write(name, count):
        turns = [
            [{"role": "user", "content": f"{name} {n}"}, {"role": "assistant", "content": f"{n}."}]
            for n in range(count)
        ]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in turns))
        return str(path)

    return write("long", 100), write("short", 20)


def gather(data, **options):
    return gather_conversations(data, (), task_items=1, held_out=40, **options)


def test_sources_without_weights_follow_each_other(files):
    found = gather(list(files))
    assert [document.place.rpartition("/")[2] for document in found.train] == [
        *(f"long.jsonl:{n}" for n in range(1, 96)),
        *(f"short.jsonl:{n}" for n in range(1, 20)),
    ]
    assert len(found.held_out) == 6


def gather_with_tasks(data, **options):
    pytest.importorskip("reasoning_gym")
    return gather_conversations(data, ["chain_sum"], **{"task_items": 60, "held_out": 18, **options})


def test_tasks_come_before_the_data_and_each_holds_out_its_share(files):
    long, short = files
    found = gather_with_tasks([long, short])
    places = [document.place.rpartition("/")[2] for document in found.train]
    assert places == [
        *(f"chain_sum item {n}" for n in range(1, 61)),
        *(f"long.jsonl:{n}" for n in range(1, 96)),
        *(f"short.jsonl:{n}" for n in range(1, 20)),
    ]
    # A third of what there is are tasks, so a third of the 18; of the others a twentieth of each source at most.
    assert [document.place.rpartition("/")[2] for document in found.held_out] == [
        *(f"chain_sum held-out item {n}" for n in range(1, 7)),
        *(f"long.jsonl:{n}" for n in range(96, 101)),
        "short.jsonl:20",
    ]


def test_what_is_held_out_of_tasks_is_what_a_run_on_tasks_alone_is_tested_on(files):
    beside, alone = gather_with_tasks(files[0], held_out=20), gather_with_tasks(None, held_out=20)
    questions = [[document.content for document in found.held_out] for found in (beside, alone)]
    assert questions[1][:7] == questions[0][:7]
    assert len(alone.held_out) == 20
    asked = {str(content) for content in questions[1]}
    assert not asked & {str(document.content) for found in (beside, alone) for document in found.train}


def test_a_weight_mixes_tasks_in_with_weight_one(files):
    found = gather_with_tasks(f"{files[0]}:3")
    tasks = sum("chain_sum" in document.place for document in found.train)
    assert 0.15 < tasks / len(found.train) < 0.35
    places = [document.place for document in found.train]
    assert len(set(places)) == 60 + 95  # each at least once, the smaller share ends it
    assert places == [document.place for document in gather_with_tasks(f"{files[0]}:3").train]


def test_what_is_held_out_is_not_drawn_however_often_its_source_is(files):
    long, short = files
    found = gather([long, f"{short}:3"])
    drawn = Counter(document.place for document in found.train)
    assert not {document.place for document in found.held_out} & set(drawn)
    assert len(drawn) == 95 + 19
    assert sum(count for place, count in drawn.items() if "short" in place) > 2 * 95
    data = render_conversations(byte_level(), found, max_length=64)
    assert len(data.samples) == len(found.train)
    assert gather([long, f"{short}:3"]).train == found.train
    assert gather([long, f"{short}:3"], seed=1).train != found.train


def test_one_source_is_read_in_its_order_whatever_its_weight(files):
    long, _ = files
    assert gather(long).train == gather(f"{long}:3").train == gather([long]).train
    assert len(gather(long).held_out) == 5


def test_streamed_documents_are_the_rows_in_another_order(files):
    streamed = list(stream_documents(list(files), shuffle_buffer=16, seed=0, bad=BadRows()))
    places = [document.place for document in streamed]
    assert len(set(places)) == len(places) == 120
    assert places != sorted(places)
    assert places == [
        document.place for document in stream_documents(list(files), shuffle_buffer=16, seed=0, bad=BadRows())
    ]
    in_order = list(stream_documents(files[0], shuffle_buffer=0, seed=0, bad=BadRows()))
    assert [document.place for document in in_order] == [f"{files[0]}:{n}" for n in range(1, 101)]


def test_a_stream_reads_no_further_than_it_must(files):
    long, _ = files
    with Path(long).open("a") as file:
        file.write("{broken\n")
    stream = stream_documents(long, shuffle_buffer=8, seed=0, bad=BadRows())
    assert len(list(islice(stream, 80))) == 80
    with pytest.raises(FastDLLMError, match=":101: not JSON"):
        list(stream)


def test_skipped_rows_are_counted_over_reading_and_rendering(files):
    long, _ = files
    with Path(long).open("a") as file:
        file.write("{broken\n")
        file.write(
            json.dumps({"messages": [{"role": "user", "content": "a"}] * 2 + [{"role": "assistant", "content": "b"}]})
        )
    with pytest.raises(FastDLLMError, match=":101: not JSON"):
        gather(long)
    data = render_conversations(byte_level(MISTRAL), gather(long, skip_bad_rows=True), max_length=64)
    assert data.skipped == 2
    assert len(data.samples) + len(data.held_out) == 100
    assert data.describe(64) == "96, 4 held out; bad rows skipped: 2"


def test_everything_lost_to_the_length_is_described(files):
    data = render_conversations(byte_level(), gather(files[0]), max_length=18)
    assert data.counts.truncated == 100
    assert data.counts.lost_ends == 100
    assert "100 cut to --max-length 18; end-of-turn tokens lost by that: 100" in data.describe(18)


def test_no_usable_row_is_one_line(files):
    with pytest.raises(
        FastDLLMError, match=r"no conversation can be used; the first: .*long\.jsonl:1: .*chat template"
    ):
        render_conversations(byte_level(None), gather(files[0], skip_bad_rows=True), max_length=64)


def test_what_is_held_out_does_not_change_what_is_trained():
    """A checkpoint says what generated items it learned by their tasks and number alone."""
    few, many = (gather_conversations(None, ["chain_sum"], task_items=300, held_out=held_out) for held_out in (10, 260))
    assert [document.content for document in few.train] == [document.content for document in many.train]
    assert (len(few.held_out), len(many.held_out)) == (10, 200)
