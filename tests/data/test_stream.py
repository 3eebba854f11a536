"""Samples that are read as they are trained: what is held out, counted, refused."""

import json
from collections import Counter
from functools import partial
from itertools import chain

import pytest

from fast_dllm.data.build import stream_documents, task_documents
from fast_dllm.data.sources import BadRows, Document
from fast_dllm.data.stream import SampleStream
from fast_dllm.errors import FastDLLMError
from tiny_tokenizers import byte_level


def write(path, count, *, lines=()):
    turns = [
        [{"role": "user", "content": f"{path.stem} {n}"}, {"role": "assistant", "content": f"{n}."}]
        for n in range(count)
    ]
    rows = [json.dumps({"messages": row}) for row in turns]
    path.write_text("\n".join([*rows, *lines]) + "\n")
    return str(path)


def stream(data, *, made=(), held_out=4, shuffle_buffer=16, max_length=64, skip=False, seed=0):
    bad = BadRows(skip=skip)

    def documents(epoch):
        return stream_documents(data, made, shuffle_buffer=shuffle_buffer, seed=seed, bad=bad, epoch=epoch)

    return SampleStream(byte_level(), documents, held_out=held_out, max_length=max_length, bad=bad)


def texts(samples):
    return [tuple(sample.input_ids) for sample in samples]


def test_every_epoch_has_every_other_sample_in_another_order(tmp_path):
    found = stream(write(tmp_path / "long.jsonl", 200))
    epochs = [texts(found.samples(epoch)) for epoch in range(3)]
    held_out = set(texts(found.held_out))
    assert len(held_out) == 4
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == 196
        assert not held_out & set(epoch)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert texts(found.samples(1)) == epochs[1]
    assert texts(stream(str(tmp_path / "long.jsonl")).samples(1)) == epochs[1]
    assert texts(stream(str(tmp_path / "long.jsonl"), seed=1).samples(1)) != epochs[1]


@pytest.mark.parametrize(("rows", "held_out"), [(200, 4), (80, 4), (79, 3), (20, 1), (19, 0)])
def test_no_more_than_a_twentieth_is_held_out(tmp_path, rows, held_out):
    found = stream(write(tmp_path / "some.jsonl", rows))
    assert len(found.held_out) == held_out
    assert len(list(found.samples(0))) == rows - held_out
    assert found.describe(64) == f"{rows - held_out}, {held_out} held out"


def test_what_is_held_out_is_not_drawn_however_often_its_source_is(tmp_path):
    long, short = write(tmp_path / "long.jsonl", 100), write(tmp_path / "short.jsonl", 20)
    found = stream([long, f"{short}:3"])
    drawn = Counter(texts(found.samples(0)))
    assert not set(drawn) & set(texts(found.held_out))
    assert len(drawn) == 120 - len(found.held_out)
    assert max(drawn.values()) > 5


def test_tasks_are_one_more_source(tmp_path):
    pytest.importorskip("reasoning_gym")
    made, _ = task_documents(["chain_sum"], 30)
    data = write(tmp_path / "some.jsonl", 30)
    documents = partial(stream_documents, seed=0, bad=BadRows(), shuffle_buffer=0)
    both = [document.place for document in documents(data, made)]
    assert sorted(both) == sorted([f"{data}:{n}" for n in range(1, 31)] + [document.place for document in made])
    assert both[:30] != sorted(both)[:30]
    assert list(documents(None, made)) == made
    weighted = [document.place for document in documents(f"{data}:3", made)]
    assert sum(place.startswith(data) for place in weighted) > 60


def test_bad_rows_are_refused_where_they_are_met_or_counted_once(tmp_path):
    data = write(tmp_path / "bad.jsonl", 100, lines=["{broken", '{"messages": []}'])
    read = stream(data, held_out=1).samples(0)
    with pytest.raises(FastDLLMError, match=r"bad\.jsonl:101: not JSON"):
        list(read)
    found = stream(data, skip=True)
    assert sum(1 for epoch in range(3) for _ in found.samples(epoch)) == 3 * 96
    assert found.describe(64) == "96, 4 held out; bad rows skipped: 2"


def test_what_is_cut_and_dropped_is_counted_in_the_first_epoch(tmp_path):
    long = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 99}]})
    late = json.dumps({"messages": [{"role": "user", "content": "a" * 99}, {"role": "assistant", "content": "b"}]})
    found = stream(write(tmp_path / "some.jsonl", 10, lines=[long, late]))
    for _ in range(2):
        list(chain(found.samples(0), found.samples(1)))
        told = "11, 0 held out; 2 cut to --max-length 64; end-of-turn tokens lost by that: 2; 1 dropped"
        assert found.describe(64).startswith(told)


def test_nothing_to_learn_from_is_one_line(tmp_path):
    with pytest.raises(FastDLLMError, match=r":1, as all others: the answer begins behind max_length=8 tokens"):
        list(stream(write(tmp_path / "some.jsonl", 9), max_length=8, shuffle_buffer=0).samples(0))
    bad = BadRows(skip=True)
    found = SampleStream(byte_level(None), lambda _: refused(9), held_out=1, max_length=64, bad=bad)
    with pytest.raises(FastDLLMError, match=r"no conversation can be used; the first: row 0: .*chat template"):
        list(found.samples(0))
    found = SampleStream(byte_level(), lambda _: refused(0), held_out=1, max_length=64, bad=bad)
    with pytest.raises(FastDLLMError, match="no conversation can be used"):
        list(found.samples(0))


def refused(count):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return (Document(turns, f"row {n}") for n in range(count))
