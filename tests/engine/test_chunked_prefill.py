"""A long prompt is prefilled in chunks, beside rows that decode."""

import pytest

from decoding_cases import MASK, Case, tokens
from digest import DigestBackbone
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.engine import scheduler
from fast_dllm.engine.engine import Engine

CONFIG = BlockDiffusionConfig(mask_token_id=15, block_size=4)


def engine_with(chunk, *, slots=4, config=CONFIG):
    model = DigestBackbone(config.context_attention)
    return Engine(model, config, slots=slots, max_length=128, prefill_chunk=chunk, prefix_cache=False)


def prompt(length):
    return [n * n % 15 for n in range(length)]


def query_tokens(events, kind):
    return [event.query_tokens for event in events if event.kind == kind]


@pytest.mark.parametrize("chunk", [1, 7, 32, 64, 1000])
@pytest.mark.parametrize("attention", ["block", "causal", "full"])
@pytest.mark.parametrize("length", [64, 75])
def test_chunks_change_no_token(attention, chunk, length):
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=8, context_attention=attention)
    decoding = DecodingConfig(max_new_tokens=20, threshold=0.4, temperature=0.7, stop_token_ids=(), verify=False)
    case = Case("qwen3", config, tokens(3, length), decoding)
    whole, chunked = case.decode(), case.decode(prefill_chunk=chunk)
    assert chunked.answers == whole.answers
    assert chunked.confidences[0] == pytest.approx(whole.confidences[0], abs=1e-9)
    total = [result.total.query_tokens_by_kind["prefill"] for result in (whole, chunked)]
    assert total[0] == total[1] == (0 if attention == "full" else 64 if length == 64 else 72)


def test_chunks_are_whole_blocks_and_at_least_one():
    for chunk, expected in ((12, [12, 12, 8]), (14, [12, 12, 8]), (1, [4] * 8), (100, [32])):
        engine = engine_with(chunk)
        engine.submit(prompt(33), DecodingConfig(max_new_tokens=3))
        assert query_tokens(engine.run(), "prefill") == expected


def test_chunks_are_of_any_length_under_causal_attention():
    engine = engine_with(13, config=BlockDiffusionConfig(mask_token_id=15, block_size=4, context_attention="causal"))
    engine.submit(prompt(33), DecodingConfig(max_new_tokens=3, verify=False))
    assert query_tokens(engine.run(), "prefill") == [13, 13, 6]


def test_only_the_last_chunk_predicts_the_next_token():
    engine = engine_with(8)
    engine.submit(prompt(32), DecodingConfig(max_new_tokens=4, stop_token_ids=(), verify=False))
    prefill = [event.positions for event in engine.run() if event.kind == "prefill"]
    assert prefill == [(), (), (), (32,)]


def test_decoding_rows_run_in_every_tick_of_a_prefill():
    engine = engine_with(8)
    decoding = engine.submit([1, 2], DecodingConfig(max_new_tokens=60, policy="sequential", stop_token_ids=()))
    engine.step()
    long = engine.submit(prompt(80), DecodingConfig(max_new_tokens=4))
    for _ in range(10):
        kinds = {event.request: event.kind for event in engine.step()}
        assert kinds[long.id] == "prefill"
        assert decoding.id in kinds


def test_prefills_share_a_tick_up_to_the_chunk_first_come_first_served():
    engine = engine_with(16)
    for length in (8, 9, 12, 4):
        engine.submit(
            prompt(length), DecodingConfig(max_new_tokens=30, policy="sequential", stop_token_ids=(), verify=False)
        )
    first = [(event.request, event.kind) for event in engine.step()]
    assert sorted(first) == [(0, "prefill"), (1, "prefill")]
    second = {event.request: event.kind for event in engine.step()}
    assert [second[n] for n in range(4)] == ["block", "block", "prefill", "prefill"]


def test_whole_prompts_share_a_tick_only_as_far_as_its_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(scheduler, "_MOST_PREFILLED", 64)
    engine = engine_with(None)
    for length in (40, 20, 20, 100):
        engine.submit(prompt(length), DecodingConfig(max_new_tokens=9, policy="sequential", stop_token_ids=()))
    ticks = [{event.request: event.kind for event in engine.step()} for _ in range(3)]
    prefilled = [sorted(request for request, kind in tick.items() if kind == "prefill") for tick in ticks]
    assert prefilled == [[0, 1], [2], [3]]


def test_forwards_of_a_request_do_not_depend_on_other_prefills():
    lengths = (70, 9, 33, 40)

    def forwards(*which):
        engine = engine_with(16)
        requests = [engine.submit(prompt(lengths[n]), DecodingConfig(max_new_tokens=9)) for n in which]
        list(engine.run())
        return [request.state.statistics for request in requests]

    assert forwards(0, 1, 2, 3) == [*forwards(0), *forwards(1), *forwards(2), *forwards(3)]
