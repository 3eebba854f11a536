"""K/V of a known beginning are not computed again, and no token changes by that."""

import pytest
import torch

from decoding_cases import MASK, backbone, tokens
from digest import DigestBackbone
from fast_dllm.cache import LayerShape, SlabCache
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.engine.engine import Engine
from fast_dllm.generation import generate_batch

CONFIG = BlockDiffusionConfig(mask_token_id=15, block_size=4)


def engine_with(slots, *, config=CONFIG, model=None, **settings):
    model = DigestBackbone(config.context_attention) if model is None else model
    return Engine(model, config, slots=slots, max_length=160, **settings)


def decoding(new=10, **settings):
    return DecodingConfig(
        **{"max_new_tokens": new, "stop_token_ids": (), "threshold": 0.6, "verify": False, **settings}
    )


def ask(engine, prompt, settings):
    """Decode one request; its state, and the slot that it had."""
    request = engine.submit(prompt, settings)
    engine.step()
    slot = request.slot
    list(engine.run())
    return request.state, slot


def prompt(length, seed=0):
    return [(n * n + seed * n + seed) % 15 for n in range(length)]


def alone(prompt, settings, config=CONFIG, model=None):
    model = DigestBackbone(config.context_attention) if model is None else model
    return generate_batch(model, config, [prompt], settings).answers[0]


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("attention", ["block", "causal"])
def test_chat_turns_recompute_only_what_is_new(attention, shift):
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=8, token_shift=shift, context_attention=attention)
    model = backbone("qwen3", attention)
    engine = engine_with(2, config=config, model=model)
    settings = decoding(20, threshold=0.4)
    chunk = 8 if attention == "block" else 16
    turn, known = tokens(1, 30), 0
    for said in range(4):
        state, slot = ask(engine, turn, settings)
        assert slot == 0
        assert state.answer() == alone(turn, settings, config, model)
        assert state.statistics.reused_tokens == known // chunk * chunk
        assert state.statistics.query_tokens_by_kind["prefill"] == len(turn) // 8 * 8 - known // chunk * chunk
        known = state.committed
        turn = [*turn, *state.answer(), *tokens(said, 9)]


def test_same_prompt_again_runs_the_one_position_that_predicts():
    engine = engine_with(1)
    first, _ = ask(engine, prompt(32), decoding())
    again, _ = ask(engine, prompt(32), decoding())
    assert again.answer() == first.answer()
    assert again.statistics.reused_tokens == 31
    assert again.statistics.query_tokens_by_kind["prefill"] == 1


def test_same_prompt_again_runs_no_prefill_where_nothing_is_predicted():
    engine = engine_with(1)
    first, _ = ask(engine, prompt(34), decoding())
    again, _ = ask(engine, prompt(34), decoding())
    assert again.answer() == first.answer()
    assert again.statistics.reused_tokens == 32
    assert again.statistics.forwards_by_kind["prefill"] == 0


def test_beginning_held_by_a_running_request_is_copied():
    engine = engine_with(2)
    running = engine.submit(prompt(40), decoding(60, policy="sequential"))
    engine.step()
    other, slot = ask(engine, [*prompt(37), 1, 2, 3, 4], decoding())
    assert (running.id, slot) == (0, 1)
    assert other.statistics.reused_tokens == 36
    assert other.answer() == alone([*prompt(37), 1, 2, 3, 4], decoding())
    assert running.state.answer() == alone(prompt(40), running.decoding)


def test_blocks_decoded_by_a_running_request_are_known_too():
    engine = engine_with(2)
    running = engine.submit(prompt(8), decoding(60, policy="sequential"))
    while running.state.committed < 24:
        engine.step()
    known = running.state.settled_ids(0, 24)
    other, _ = ask(engine, [*known, 1], decoding())
    assert other.statistics.reused_tokens == 24
    assert other.answer() == alone([*known, 1], decoding())


def test_burst_of_requests_with_one_beginning_computes_it_once():
    engine = engine_with(4, prefill_chunk=16)
    requests = [engine.submit([*prompt(64), n, 5], decoding()) for n in range(4)]
    list(engine.run())
    assert [request.state.statistics.reused_tokens for request in requests] == [0, 64, 64, 64]
    assert [r.state.answer() for r in requests] == [alone([*prompt(64), n, 5], decoding()) for n in range(4)]


def test_conversation_is_not_lost_to_another_that_shares_its_beginning():
    engine = engine_with(3)
    first, _ = ask(engine, prompt(60), decoding())
    other, slot = ask(engine, [*prompt(20), *prompt(20, seed=3)], decoding())
    assert slot == 1
    assert other.statistics.reused_tokens == 20
    again, slot = ask(engine, [*prompt(60), *first.answer(), 7], decoding())
    assert slot == 0
    assert again.statistics.reused_tokens == first.committed


def test_least_recently_used_slot_is_given_up():
    engine = engine_with(2)
    a, b, c = prompt(24, 1), prompt(24, 2), prompt(24, 4)
    ask(engine, a, decoding())
    ask(engine, b, decoding())
    assert ask(engine, [*a, 1], decoding())[0].statistics.reused_tokens == 24
    assert ask(engine, c, decoding())[1] == 1  # b's
    assert ask(engine, [*a, 2], decoding())[0].statistics.reused_tokens == 24
    assert ask(engine, [*b, 2], decoding())[0].statistics.reused_tokens == 0


def test_eviction_does_not_touch_running_rows():
    engine = engine_with(2)
    running = engine.submit(prompt(40, 1), decoding(80, policy="sequential"))
    engine.step()
    for seed in range(2, 7):
        state, slot = ask_beside(engine, prompt(30, seed))
        assert slot == 1
        assert state.answer() == alone(prompt(30, seed), decoding())
    assert running.state.finish is None
    list(engine.run())
    assert running.state.answer() == alone(prompt(40, 1), running.decoding)


def ask_beside(engine, prompt):
    request = engine.submit(prompt, decoding())
    engine.step()
    slot = request.slot
    while request.state.finish is None:
        engine.step()
    return request.state, slot


def test_keys_of_another_block_size_are_not_reused_unless_causal():
    for attention, reused in (("block", 0), ("causal", 32)):
        engine = engine_with(1, config=BlockDiffusionConfig(mask_token_id=15, context_attention=attention))
        ask(engine, prompt(41), decoding(block_size=8))
        assert ask(engine, prompt(41), decoding(block_size=4))[0].statistics.reused_tokens == reused


def test_cancelled_request_leaves_only_final_keys_behind():
    engine = engine_with(1, prefill_chunk=8)
    cancelled = engine.submit(prompt(40), decoding())
    engine.step()
    engine.step()
    engine.cancel(cancelled)
    state, _ = ask(engine, prompt(40), decoding())
    assert state.statistics.reused_tokens == 16
    assert state.answer() == alone(prompt(40), decoding())


def test_nothing_is_reused_under_full_attention():
    config = BlockDiffusionConfig(mask_token_id=15, context_attention="full")
    engine = engine_with(2, config=config)
    first, _ = ask(engine, prompt(40), decoding())
    again, _ = ask(engine, prompt(40), decoding())
    assert again.answer() == first.answer()
    assert again.statistics.reused_tokens == 0


def test_nothing_is_reused_without_the_prefix_cache():
    engine = engine_with(2, prefix_cache=False)
    for _ in range(2):
        state, slot = ask(engine, prompt(40), decoding())
        assert slot == 0
        assert state.statistics.reused_tokens == 0


def test_hash_collisions_are_found_out(monkeypatch):
    monkeypatch.setattr("fast_dllm.engine.prefix._link", lambda previous, chunk: previous + 1)
    engine = engine_with(2)
    for seed in (1, 2, 3):
        state, _ = ask(engine, prompt(40, seed), decoding())
        assert state.answer() == alone(prompt(40, seed), decoding())


def test_index_forgets_what_is_overwritten():
    engine = engine_with(2)
    for seed in range(20):
        ask(engine, prompt(40, seed), decoding())
    index = engine._prefixes
    assert len(index._held) <= 2
    assert set().union(*index._holders.values()) <= {0, 1}
    assert len(index._holders) <= 2 * 160 // 4


def test_copy_takes_the_beginning_of_one_slot_to_another():
    cache = SlabCache([LayerShape(2, 3, 4), LayerShape(1, 2, 2)], 3, 6, dtype=torch.float64, device="cpu")
    for slab in (*cache.keys, *cache.values):
        slab.normal_()
    before = [slab.clone() for slab in (*cache.keys, *cache.values)]
    cache.copy(2, 0, 4)
    for slab, old in zip((*cache.keys, *cache.values), before, strict=True):
        assert slab[0, :, :4].equal(old[2, :, :4])
        assert slab[0, :, 4:].equal(old[0, :, 4:])
        assert slab[1:].equal(old[1:])
