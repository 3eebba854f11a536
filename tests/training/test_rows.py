"""Rows of a stream: what is held at a time, and what packing makes of it."""

import gc
from dataclasses import replace
from itertools import islice

import pytest

from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.data.chat import Sample
from fast_dllm.data.mixture import shuffled
from fast_dllm.data.packing import Packed
from fast_dllm.data.sources import BadRows, Document
from fast_dllm.data.stream import SampleStream
from fast_dllm.training.options import AdaptOptions
from fast_dllm.training.rows import digest_of, lay_rows, open_run, rows_of
from fast_dllm.training.schedule import WINDOW
from samples import make_samples
from tiny import tiny_tokenizer

CONFIG = BlockDiffusionConfig(mask_token_id=54, block_size=8)
OPTIONS = AdaptOptions(max_length=64, block_size=8)
ROWS, BUFFER, BATCH = 3000, 50, 2
A_FEW = 4  # what is on its way from one stage to the next


def documents(epoch):
    """Rows that nobody holds but who asked for them."""
    for n in range(ROWS):
        turns = [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "ok" * (n % 7)}]
        yield Document(turns, f"{n}")


@pytest.fixture
def only_new_objects():
    """Let `gc.get_objects` leave out what was there before: late in a session it is millions."""
    gc.freeze()
    yield
    gc.unfreeze()


def alive(kind):
    return [found for found in gc.get_objects() if type(found) is kind]


def tokens_held():
    rows = sum(len(row.input_ids) for row in alive(Packed))
    return rows + sum(len(sample.input_ids) for sample in alive(Sample))


@pytest.mark.usefixtures("only_new_objects")
@pytest.mark.parametrize("pack", [False, True])
def test_no_more_is_held_than_the_buffer_and_a_window(pack):
    options = replace(OPTIONS, pack=pack)
    stream = SampleStream(
        tiny_tokenizer(),
        lambda epoch: shuffled(documents(epoch), BUFFER, seed=epoch),
        held_out=0,
        max_length=options.max_length,
        bad=BadRows(),
    )
    window = WINDOW * BATCH
    rows = open_run(stream.samples, CONFIG, options, BATCH)()
    before = len(alive(Document)), len(alive(Packed)), tokens_held()
    most = 0, 0, 0
    # An odd stride looks at the windows at all their ages; 1,500 rows are more than one packed epoch.
    for number, _ in enumerate(islice(rows, 1500)):
        if number % 13 == 0 or number % window in (0, 1, window - 1):
            held = len(alive(Document)), len(alive(Packed)), tokens_held()
            most = tuple(map(max, most, held))
    documents_held, rows_held, tokens = (now - then for now, then in zip(most, before, strict=True))
    assert BUFFER <= documents_held <= BUFFER + A_FEW
    assert window - 1 <= rows_held <= window + A_FEW
    assert tokens <= (window + A_FEW) * options.max_length


def test_packing_a_stream_loses_nothing_and_wastes_little():
    options = replace(OPTIONS, pack=True)
    samples = make_samples(500)
    rows = list(lay_rows(iter(samples), CONFIG, options, window=20))
    assert all(len(row.input_ids) <= options.max_length for row in rows)
    assert sum(int(row.loss_mask.sum()) for row in rows) == sum(sum(sample.loss_mask) for sample in samples)
    assert len(rows) <= 1.1 * len(rows_of(samples, CONFIG, options))


def test_without_packing_a_stream_has_the_rows_of_memory():
    samples = make_samples(50)
    streamed, all_of_them = list(lay_rows(iter(samples), CONFIG, OPTIONS, window=20)), rows_of(samples, CONFIG, OPTIONS)
    assert [row.input_ids.tolist() for row in streamed] == [row.input_ids.tolist() for row in all_of_them]


def test_the_order_of_a_stream_hangs_on_the_global_batch_alone():
    runs = [open_run(lambda epoch: make_samples(48), CONFIG, OPTIONS, 8)() for _ in range(2)]
    one, other = ([row.input_ids.tolist() for row in islice(run, 100)] for run in runs)
    assert one == other
    assert one[:48] != one[48:96]


def test_a_stream_is_not_read_twice_for_its_digest():
    opened = []

    def epochs(number):
        opened.append(number)
        return iter(make_samples(100))

    digest, samples = digest_of(epochs)
    assert list(samples(0)) == list(samples(1)) == make_samples(100)
    assert opened == [0, 1]
    assert list(samples(0)) == make_samples(100)
    assert digest == digest_of(make_samples(64))[0] != digest_of(make_samples(63))[0]
