"""What the slab holds is what one forward over the whole sequence would compute."""

import pytest
import torch

from decoding_cases import confident_model, tokens
from fast_dllm.cache import LayerShape, SlabCache
from fast_dllm.masks import dense_mask, sequence_tokens
from fast_dllm.model.backbone import ForwardBatch, RowSpan
from fast_dllm.model.forward import head_logits, hidden_states
from fast_dllm.model.hf import HFBackbone
from tiny import ARCHITECTURES, tiny_model

BLOCK = 8


def forward(model, cache, rows, *, visible_end=None, noisy=False):
    """One forward of (slot, ids, start) rows of equal length; logits [R, Q, V]."""
    length = len(rows[0][1])
    ends = [start + length for _, _, start in rows] if visible_end is None else visible_end
    spans = [
        RowSpan(slot, start, start + length, end, start // BLOCK * BLOCK if noisy else end, BLOCK)
        for (slot, _, start), end in zip(rows, ends, strict=True)
    ]
    ids = [token for _, row, _ in rows for token in row]
    batch = ForwardBatch.build(spans, ids, range(len(ids)))
    return model.forward(batch, cache).view(len(rows), length, -1)


@torch.inference_mode()
def dense_logits(model, ids, attention):
    position = torch.arange(len(ids))[None]
    mask = dense_mask(sequence_tokens(position, BLOCK), attention)
    return head_logits(model, hidden_states(model, torch.tensor([ids]), position, mask))[0]


@pytest.mark.parametrize("attention", ["block", "causal"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_by_block_equals_one_forward_over_all(architecture, attention):
    model = tiny_model(architecture)
    backbone = HFBackbone(model, attention)
    cache = backbone.new_cache(4, 64)
    sequences = {0: tokens(1, 64), 1: tokens(2, 48), 3: tokens(3, 56)}
    expected = {slot: dense_logits(model, ids, attention) for slot, ids in sequences.items()}
    # Ragged: each row is some blocks ahead of the others.
    place = {0: 0, 1: 16, 3: 8}
    forward(backbone, cache, [(1, sequences[1][:16], 0)])
    forward(backbone, cache, [(3, sequences[3][:8], 0)])
    while place:
        rows = [(slot, sequences[slot][start : start + BLOCK], start) for slot, start in place.items()]
        # A denoising forward in between leaves no trace in what is committed.
        forward(backbone, cache, [(slot, tokens(9, BLOCK), start) for slot, _, start in rows], noisy=True)
        logits = forward(backbone, cache, rows)
        for (slot, _, start), row in zip(rows, logits, strict=True):
            torch.testing.assert_close(row, expected[slot][start : start + BLOCK], atol=1e-5, rtol=1e-5)
        place = {slot: start + BLOCK for slot, start in place.items() if start + BLOCK < len(sequences[slot])}


@pytest.mark.parametrize("attention", ["block", "causal"])
def test_noisy_block_sees_all_of_itself_whatever_the_context_attention(attention):
    model = tiny_model("qwen3", dtype=torch.float64)
    backbone = HFBackbone(model, attention)
    ids = tokens(4, 24)

    def last_block(changed):
        cache = backbone.new_cache(1, 24)
        forward(backbone, cache, [(0, ids[:16], 0)])
        return forward(backbone, cache, [(0, changed, 16)], noisy=True)[0]

    changed = [*ids[16:23], (ids[23] + 1) % 60]
    assert ((last_block(ids[16:]) - last_block(changed)).abs().amax(-1) > 1e-6).all()


def test_sub_block_forward_right_after_a_refresh_equals_the_block_forward():
    model = confident_model("qwen2")
    backbone = HFBackbone(model, "block")
    cache = backbone.new_cache(1, 24)
    ids = tokens(4, 24)
    forward(backbone, cache, [(0, ids[:16], 0)])
    whole = forward(backbone, cache, [(0, ids[16:], 16)], noisy=True)[0]
    part = forward(backbone, cache, [(0, ids[19:22], 19)], visible_end=[24], noisy=True)[0]
    torch.testing.assert_close(part, whole[3:6], atol=1e-12, rtol=1e-12)


def test_what_a_slot_held_before_is_unreachable():
    model = confident_model("llama")
    backbone = HFBackbone(model, "block")
    used, fresh = backbone.new_cache(2, 32), backbone.new_cache(2, 32)
    for slab in (*used.keys, *used.values):
        slab.normal_(0, 100)
    ids = tokens(5, 16)
    a = forward(backbone, used, [(1, ids, 0)])
    b = forward(backbone, fresh, [(1, ids, 0)])
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_slots_side_by_side_are_read_without_a_copy():
    cache = SlabCache([LayerShape(2, 4, 4)], 4, 8, dtype=torch.float32, device="cpu")
    keys, values = cache.read(0, slice(1, 3), 5)
    assert keys.shape == values.shape == (2, 2, 5, 4)
    assert keys.untyped_storage().data_ptr() == cache.keys[0].untyped_storage().data_ptr()


def test_write_touches_only_its_rows_and_positions():
    cache = SlabCache([LayerShape(1, 2, 3)], 3, 6, dtype=torch.float32, device="cpu")
    keys, values = torch.ones(4, 1, 2), torch.ones(4, 1, 3)
    cache.write(0, torch.tensor([0, 0, 2, 2]), torch.tensor([1, 2, 4, 5]), keys, values)
    touched = cache.keys[0][:, 0, :, 0].nonzero().tolist()
    assert touched == [[0, 1], [0, 2], [2, 4], [2, 5]]
    assert cache.values[0].sum() == 12


def test_lowest_free_slot_is_taken_first():
    cache = SlabCache([], 3, 8, dtype=torch.float32, device="cpu")
    assert [cache.allocate() for _ in range(3)] == [0, 1, 2]
    cache.free(2)
    cache.free(0)
    assert cache.free_slots == 2
    assert cache.allocate() == 0
