import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast_dllm.data.chat import Sample
from fast_dllm.data.packing import NO_DOCUMENT, Packed, collate, pack, pad_to_blocks
from fast_dllm.errors import FastDLLMError

PAD = 999
LENGTH = 32

lengths = st.lists(st.integers(1, LENGTH), min_size=1, max_size=20)
block_sizes = st.sampled_from([1, 4, 8, 32])


def make_samples(sizes):
    """Samples whose tokens are all different, so that a lost or doubled one shows."""
    samples, first = [], 1000
    for size in sizes:
        ids = list(range(first, first + size))
        samples.append(Sample(ids, [token % 3 == 0 for token in ids]))
        first += size
    return samples


def documents_of(row):
    """(start, ids without padding, losses) of each document in a row."""
    for number in range(int(row.document_ids.max()) + 1):
        [places] = torch.nonzero(row.document_ids == number, as_tuple=True)
        kept = places[row.input_ids[places] != PAD]
        yield int(places[0]), row.input_ids[kept].tolist(), row.loss_mask[kept].tolist()


@given(lengths, block_sizes, st.booleans())
def test_nothing_is_lost_or_doubled(sizes, block_size, pad_blocks):
    samples = make_samples(sizes)
    rows = pack(samples, length=LENGTH, block_size=block_size, pad_id=PAD, pad_blocks=pad_blocks)
    found = sorted((ids, losses) for row in rows for _, ids, losses in documents_of(row))
    assert found == [(sample.input_ids, sample.loss_mask) for sample in samples]


@given(lengths, block_sizes, st.booleans())
def test_rows_are_whole_blocks_within_the_length(sizes, block_size, pad_blocks):
    rows = pack(make_samples(sizes), length=LENGTH, block_size=block_size, pad_id=PAD, pad_blocks=pad_blocks)
    for row in rows:
        assert len(row.input_ids) <= LENGTH
        assert len(row.input_ids) % block_size == 0


@given(lengths, block_sizes)
def test_documents_start_at_block_borders(sizes, block_size):
    for row in pack(make_samples(sizes), length=LENGTH, block_size=block_size, pad_id=PAD):
        assert all(start % block_size == 0 for start, _, _ in documents_of(row))
        # No padding is left outside the documents.
        assert (row.document_ids != NO_DOCUMENT).all()


@given(lengths, block_sizes, st.booleans())
def test_positions_restart_in_each_document(sizes, block_size, pad_blocks):
    for row in pack(make_samples(sizes), length=LENGTH, block_size=block_size, pad_id=PAD, pad_blocks=pad_blocks):
        for number in row.document_ids.unique().tolist():
            positions = row.position_ids[row.document_ids == number]
            expected = torch.zeros_like(positions) if number == NO_DOCUMENT else torch.arange(len(positions))
            assert torch.equal(positions, expected)


@given(lengths, block_sizes, st.booleans())
def test_padding_carries_no_loss(sizes, block_size, pad_blocks):
    for row in pack(make_samples(sizes), length=LENGTH, block_size=block_size, pad_id=PAD, pad_blocks=pad_blocks):
        assert not row.loss_mask[row.input_ids == PAD].any()


@given(lengths)
def test_each_sample_goes_into_the_first_row_with_room(sizes):
    expected, free = [], []
    for sample in make_samples(sizes):
        size = len(sample.input_ids)
        row = next((index for index, room in enumerate(free) if room >= size), None)
        if row is None:
            expected.append([])
            free.append(LENGTH)
            row = len(free) - 1
        expected[row].append(sample.input_ids)
        free[row] -= size
    rows = pack(make_samples(sizes), length=LENGTH, block_size=1, pad_id=PAD)
    assert [[ids for _, ids, _ in documents_of(row)] for row in rows] == expected


@pytest.mark.parametrize(("size", "padded"), [(1, 4), (4, 4), (5, 8)])
def test_padding_reaches_the_next_block(size, padded):
    [sample] = make_samples([size])
    result = pad_to_blocks(sample, 4, PAD)
    assert result.input_ids == sample.input_ids + [PAD] * (padded - size)
    assert result.loss_mask == sample.loss_mask + [False] * (padded - size)


def test_padding_keeps_the_truncation_mark():
    assert pad_to_blocks(Sample([1], [True], truncated=True), 4, PAD).truncated


def test_naive_samples_follow_each_other_without_padding():
    [row] = pack(make_samples([3, 2]), length=8, block_size=4, pad_id=PAD, pad_blocks=False)
    assert row.document_ids.tolist() == [0, 0, 0, 1, 1, -1, -1, -1]
    assert row.input_ids.tolist() == [1000, 1001, 1002, 1003, 1004, PAD, PAD, PAD]


def test_collating_pads_to_the_longest_row():
    rows = pack(make_samples([8, 3]), length=8, block_size=4, pad_id=PAD)
    batch = collate(rows, PAD)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ["input_ids", "loss_mask", "position_ids", "document_ids"], (2, 8)
    )
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "loss_mask": torch.bool,
        "position_ids": torch.int64,
        "document_ids": torch.int32,
    }
    assert batch["input_ids"][1].tolist() == [1008, 1009, 1010, PAD, PAD, PAD, PAD, PAD]
    assert batch["document_ids"][1].tolist() == [0, 0, 0, 0, -1, -1, -1, -1]
    assert not batch["loss_mask"][1, 3:].any()


def test_no_samples_make_no_rows():
    assert pack([], length=8, block_size=4, pad_id=PAD) == []


@pytest.mark.parametrize(
    ("sizes", "length", "error"),
    [
        ([2, 9], 8, "sample 1 has 9 tokens, more than length=8; truncate it"),
        ([2, 0], 8, "sample 1 is empty"),
        ([2], 6, "length=6 is not a multiple of block_size=4"),
        ([2], 0, "length=0"),
    ],
)
def test_bad_input_is_named(sizes, length, error):
    with pytest.raises(FastDLLMError, match=error):
        pack(make_samples(sizes), length=length, block_size=4, pad_id=PAD)


def test_a_packed_row_is_frozen():
    [row] = pack(make_samples([2]), length=4, block_size=4, pad_id=PAD)
    assert isinstance(row, Packed)
    with pytest.raises(AttributeError):
        row.input_ids = row.input_ids


@given(lengths, block_sizes, st.booleans())
def test_samples_that_are_not_separate_read_on_as_one(sizes, block_size, pad_blocks):
    samples = make_samples(sizes)
    settings = {"length": LENGTH, "block_size": block_size, "pad_id": PAD, "pad_blocks": pad_blocks}
    apart, together = (pack(samples, **settings, separate=separate) for separate in (True, False))
    for own, joined in zip(apart, together, strict=True):
        assert torch.equal(own.input_ids, joined.input_ids)
        assert torch.equal(own.loss_mask, joined.loss_mask)
        inside = own.document_ids != NO_DOCUMENT
        assert torch.equal(joined.document_ids[inside], torch.zeros_like(own.document_ids[inside]))
        assert joined.position_ids[inside].tolist() == list(range(int(inside.sum())))
