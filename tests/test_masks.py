"""Who attends to whom: tables written by hand, and the three forms of one predicate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_dllm.masks import CLEAN, NOWHERE, Tokens, dense_mask, flex_mask, sequence_tokens, visible, visible_ends

ATTENTIONS = ("block", "causal", "full")

# Blocks of two: noisy view 1 (a b | c d), noisy view 2 (e f | g h), clean (p q | r s); rows see columns.
TRAINING = {
    "block": """
          ab cd ef gh pq rs
        a 11 .. .. .. .. ..
        b 11 .. .. .. .. ..
        c .. 11 .. .. 11 ..
        d .. 11 .. .. 11 ..
        e .. .. 11 .. .. ..
        f .. .. 11 .. .. ..
        g .. .. .. 11 11 ..
        h .. .. .. 11 11 ..
        p .. .. .. .. 11 ..
        q .. .. .. .. 11 ..
        r .. .. .. .. 11 11
        s .. .. .. .. 11 11
    """,
    "causal": """
          ab cd ef gh pq rs
        a 11 .. .. .. .. ..
        b 11 .. .. .. .. ..
        c .. 11 .. .. 11 ..
        d .. 11 .. .. 11 ..
        e .. .. 11 .. .. ..
        f .. .. 11 .. .. ..
        g .. .. .. 11 11 ..
        h .. .. .. 11 11 ..
        p .. .. .. .. 1. ..
        q .. .. .. .. 11 ..
        r .. .. .. .. 11 1.
        s .. .. .. .. 11 11
    """,
    "full": """
          ab cd ef gh pq rs
        a 11 .. .. .. .. ..
        b 11 .. .. .. .. ..
        c .. 11 .. .. 11 ..
        d .. 11 .. .. 11 ..
        e .. .. 11 .. .. ..
        f .. .. 11 .. .. ..
        g .. .. .. 11 11 ..
        h .. .. .. 11 11 ..
        p .. .. .. .. 11 11
        q .. .. .. .. 11 11
        r .. .. .. .. 11 11
        s .. .. .. .. 11 11
    """,
}

# Decoding: clean blocks (0 1 | 2 3), then the noisy block (4 5); keys 6 and 7 belong to someone else.
DECODING = {
    "block": "11.... 11.... 1111.. 1111.. 111111 111111",
    "causal": "1..... 11.... 111... 1111.. 111111 111111",
}


def table(text):
    rows = [line.split()[1:] for line in text.strip().splitlines()[1:]]
    return torch.tensor([[cell == "1" for cell in "".join(row)] for row in rows])


def training_tokens(blocks=2, size=2, views=2):
    length = blocks * size
    place = torch.arange(length).repeat(views + 1)
    stream = torch.tensor([*range(1, views + 1), CLEAN]).repeat_interleave(length)
    return Tokens(*(field[None] for field in (stream, place // size, place, torch.zeros_like(place))))


def flex_as_dense(tokens, attention, keys=None):
    """The mask_mod behind the `BlockMask`, asked about every pair."""
    block_mask = flex_mask(tokens, attention, keys=keys)
    (rows, length), seen = tokens.stream.shape, (keys or tokens).stream.shape[1]
    b = torch.arange(rows)[:, None, None, None]
    q, k = torch.arange(length)[None, None, :, None], torch.arange(seen)[None, None, None, :]
    return block_mask.mask_mod(b, torch.tensor(0), q, k).expand(rows, 1, length, seen), block_mask


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_training_mask_is_the_table(attention):
    assert torch.equal(dense_mask(training_tokens(), attention)[0, 0], table(TRAINING[attention]))


def decoding_mask(start, end, keys, attention, **row):
    ends = visible_ends(start, end, attention=attention, **row)
    return torch.arange(keys) < torch.tensor(ends)[:, None]


@pytest.mark.parametrize("attention", DECODING)
def test_decoding_mask_is_the_table(attention):
    expected = torch.tensor([[cell == "1" for cell in f"{row}.."] for row in DECODING[attention].split()])
    mask = decoding_mask(0, 6, 8, attention, visible_end=6, noisy_from=4, block_size=2)
    assert torch.equal(mask, expected)


def test_decoding_mask_of_a_full_attention_canvas_shows_all_of_it():
    mask = decoding_mask(2, 4, 8, "full", visible_end=6, noisy_from=0, block_size=6)
    assert mask.tolist() == [[True] * 6 + [False] * 2] * 2


def naive_visible(query, key, attention):
    (q_stream, q_block, q_place, q_document), (k_stream, k_block, k_place, k_document) = query, key
    if q_document != k_document:
        return False
    if q_stream == CLEAN:
        if k_stream != CLEAN:
            return False
        return {"block": k_block <= q_block, "causal": k_place <= q_place, "full": True}[attention]
    if k_stream == CLEAN:
        return k_block < q_block
    return k_stream == q_stream and k_block == q_block


@st.composite
def packed_rows(draw):
    """Rows of tokens in any order: streams, documents that share block numbers, and padding."""
    rows, length, size = draw(st.integers(1, 3)), draw(st.integers(1, 10)), draw(st.sampled_from([1, 2, 3]))
    number = st.tuples(st.integers(0, 2), st.integers(0, 8), st.sampled_from([0, 0, 1, NOWHERE]))
    cells = draw(st.lists(st.lists(number, min_size=length, max_size=length), min_size=rows, max_size=rows))
    stream, place, document = torch.tensor(cells).permute(2, 0, 1)
    return Tokens(stream, place // size, place, document)


@settings(max_examples=60)
@given(packed_rows(), st.sampled_from(ATTENTIONS))
def test_dense_and_flex_masks_equal_the_rules_pair_by_pair(tokens, attention):
    every = torch.stack(tokens, dim=-1).tolist()
    expected = torch.tensor([[[[naive_visible(q, k, attention) for k in row] for q in row]] for row in every])
    assert torch.equal(dense_mask(tokens, attention), expected)
    assert torch.equal(flex_as_dense(tokens, attention)[0], expected)
    keys = Tokens(*(torch.cat([field, field[:, :1]], dim=1) for field in tokens))
    assert torch.equal(flex_as_dense(tokens, attention, keys)[0], dense_mask(tokens, attention, keys=keys))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_flex_block_mask_skips_no_pair_that_is_visible(attention):
    # Longer than one 128 x 128 tile; documents and padding too.
    tokens = training_tokens(blocks=40, size=4)
    document = torch.where(tokens.place < 80, 0, 1).masked_fill(tokens.place >= 156, NOWHERE)
    tokens = tokens._replace(document=document)
    mask, block_mask = flex_as_dense(tokens, attention)
    assert torch.equal(mask, dense_mask(tokens, attention))
    tiles = block_mask.to_dense().bool()
    tile = block_mask.BLOCK_SIZE[0]
    for q in range(tiles.shape[-2]):
        for k in range(tiles.shape[-1]):
            any_visible = mask[0, 0, q * tile : (q + 1) * tile, k * tile : (k + 1) * tile].any()
            assert bool(tiles[0, 0, q, k]) == bool(any_visible)


@settings(max_examples=60)
@given(st.sampled_from(ATTENTIONS), st.sampled_from([1, 2, 4, 8]), st.integers(0, 4), st.booleans(), st.data())
def test_decoding_mask_equals_the_dense_mask(attention, size, blocks, noisy, data):
    """So many committed blocks and one more, noisy or about to be committed, seen from some of their positions."""
    if attention == "full" and noisy:
        blocks = 0  # the canvas is the noisy block
    end = size * (blocks + 1)
    noisy_from = size * blocks if noisy else end
    start = data.draw(st.integers(0, end - 1))
    tokens = sequence_tokens(torch.arange(end)[None], size)
    tokens = tokens._replace(stream=(tokens.place >= noisy_from).long())
    mask = decoding_mask(start, end, end + 3, attention, visible_end=end, noisy_from=noisy_from, block_size=size)
    assert torch.equal(mask[:, :end], dense_mask(tokens, attention)[0, 0, start:])
    assert not mask[:, end:].any()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_padding_sees_only_padding(attention):
    tokens = sequence_tokens(torch.arange(6)[None], 2)
    tokens = tokens._replace(document=torch.tensor([[0, 0, 0, 0, NOWHERE, NOWHERE]]))
    mask = dense_mask(tokens, attention)[0, 0]
    assert not mask[:4, 4:].any()
    assert not mask[4:, :4].any()
    assert mask.any(-1).all()


def test_block_size_one_is_token_causal_under_block_attention():
    tokens = sequence_tokens(torch.arange(7)[None], 1)
    assert torch.equal(dense_mask(tokens, "block"), dense_mask(tokens, "causal"))
    assert torch.equal(dense_mask(tokens, "block")[0, 0], torch.ones(7, 7, dtype=torch.bool).tril())


def test_predicate_broadcasts():
    tokens = sequence_tokens(torch.arange(4)[None], 2)
    query = Tokens(*(field[0, :, None] for field in tokens))
    assert visible(query, Tokens(*(field[0] for field in tokens)), "block").shape == (4, 4)
