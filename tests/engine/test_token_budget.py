"""Running requests hold no more positions than the budget; who is preempted goes on as if nothing had been."""

import pytest

from decoding_cases import MASK, STOPS, backbone, tokens
from digest import DigestBackbone
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.engine.engine import Engine
from fast_dllm.errors import FastDLLMError
from fast_dllm.generation import generate_batch

CONFIG = BlockDiffusionConfig(mask_token_id=15, block_size=4)


def engine_with(budget, *, slots=4, **settings):
    return Engine(DigestBackbone(), CONFIG, slots=slots, max_length=64, token_budget=budget, **settings)


def long_decoding(new=32, **settings):
    return DecodingConfig(max_new_tokens=new, policy="sequential", stop_token_ids=(), **{"verify": False, **settings})


def run(engine):
    """Ticks of events."""
    ticks = []
    while not engine.idle:
        ticks.append(engine.step())
        assert ticks[-1], "a tick without a forward"
        assert len(ticks) < 2000
    return ticks


def test_requests_are_admitted_while_prompt_and_first_block_fit():
    engine = engine_with(24)
    requests = [engine.submit([1] * length, long_decoding(2)) for length in (8, 5, 1, 1)]
    engine.step()
    # 8 + 4, 4 + 4, and 4; the last would be the 28th.
    assert [request.held for request in requests] == [12, 8, 4, 0]
    assert [request.slot is None for request in requests] == [False, False, False, True]


def test_no_request_overtakes_one_that_does_not_fit():
    engine = engine_with(40)
    engine.submit([1] * 16, long_decoding(4))
    large = engine.submit([1] * 24, long_decoding(4))
    small = engine.submit([1], long_decoding(4))
    engine.step()
    assert large.slot is None
    assert small.slot is None


def test_growth_preempts_the_youngest_which_returns_to_the_head_of_the_queue():
    engine = engine_with(24)
    old, middle, young = (engine.submit([n] * 5, long_decoding(12)) for n in (1, 2, 3))
    later = engine.submit([4], long_decoding(1))
    engine.step()
    assert (old.held, middle.held, young.held, later.held) == (8, 8, 8, 0)
    while young.slot is not None:
        engine.step()
    assert old.held + middle.held <= 24
    assert old.held == 12
    assert engine._scheduler.waiting[0] is young
    assert young.state.finish is None
    list(engine.run())
    assert {request.state.finish for request in (old, middle, young, later)} == {"length"}


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("cache", ["none", "dual", "prefix"])
@pytest.mark.parametrize("attention", ["block", "causal"])
def test_preempted_requests_get_the_tokens_they_would_have_had(attention, cache, prefix_cache):
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=8, context_attention=attention)
    model = backbone("qwen3", attention)
    decoding = DecodingConfig(
        max_new_tokens=40,
        small_block_size=4,
        threshold=0.5,
        temperature=0.9,
        sub_block_cache=cache,
        stop_token_ids=(),
        verify=False,
    )
    prompts = [tokens(n, length) for n, length in enumerate((16, 21, 8, 30))]
    alone = [generate_batch(model, config, [prompt], decoding, STOPS) for prompt in prompts]
    engine = Engine(model, config, slots=4, max_length=72, token_budget=96, prefix_cache=prefix_cache, prefill_chunk=16)
    requests = [engine.submit(prompt, decoding) for prompt in prompts]
    told = {request.id: [] for request in requests}
    preempted = False
    while not engine.idle:
        for event in engine.step():
            told[event.request] += zip(event.positions, event.tokens, strict=True)
        preempted |= any(waiting.state.statistics.forwards > 0 for waiting in engine._scheduler.waiting)
    assert preempted
    for request, result in zip(requests, alone, strict=True):
        assert request.state.answer() == result.answers[0]
        assert len(dict(told[request.id])) == len(told[request.id])
        assert request.state.confidences[:40] == pytest.approx(result.confidences[0], abs=1e-9)


def test_block_with_a_sub_block_cache_is_finished_before_its_request_is_preempted():
    engine = engine_with(12, prefix_cache=False)
    old = engine.submit([1], long_decoding(11))
    young = engine.submit([2], long_decoding(7, block_size=8, sub_block_cache="dual"))
    stalled = 0
    while young.state.finish is None:
        events = engine.step()
        assert young.id in {event.request for event in events}
        stalled += old.id not in {event.request for event in events}
    assert stalled
    run(engine)
    assert old.state.finish == young.state.finish == "length"


def ticks_that_leave_out(engine, request, then):
    """Step until a request has to wait; call `then`, and yield the requests of each tick until it need not."""
    running = {request.id}
    while request.id in running:
        running = {event.request for event in engine.step()}
    then()
    while request.id not in running:
        yield running
        running = {event.request for event in engine.step()}


def test_nobody_is_admitted_while_an_older_request_waits_for_a_block():
    engine = engine_with(18, prefix_cache=False)
    old = engine.submit([1], long_decoding(15, block_size=8))
    for _ in range(4):
        engine.step()
    engine.submit([2], long_decoding(7, block_size=8, sub_block_cache="dual"))
    newcomers = []
    waits = ticks_that_leave_out(
        engine, old, lambda: newcomers.append(engine.submit([3], long_decoding(1, block_size=1)))
    )
    assert [len(running) for running in waits] == [1, 1, 1]
    run(engine)
    assert newcomers[0].state.finish == "length"


def test_nobody_younger_grows_while_an_older_request_waits_for_a_block():
    engine = engine_with(24, prefix_cache=False)
    old = engine.submit([1], long_decoding(15, block_size=8))
    for _ in range(4):
        engine.step()
    grows = engine.submit([2], long_decoding(20, block_size=1))
    interrupts_not = engine.submit([3], long_decoding(7, block_size=8, sub_block_cache="dual"))
    waits = list(ticks_that_leave_out(engine, old, lambda: None))
    assert waits
    assert all(running == {interrupts_not.id} for running in waits)
    run(engine)
    assert grows.state.finish == "length"


def test_budget_of_one_request_serves_any_number():
    engine = engine_with(24)
    requests = [engine.submit([n] * 9, long_decoding(12)) for n in range(5)]
    run(engine)
    assert all(request.state.finish == "length" for request in requests)


def test_request_that_can_never_fit_is_refused_in_one_line():
    engine = engine_with(24)
    engine.submit([1] * 12, long_decoding(12))
    with pytest.raises(
        FastDLLMError, match="needs 28 positions, the token budget is 24; lower max_new_tokens"
    ) as error:
        engine.submit([1] * 13, long_decoding(12))
    assert "\n" not in str(error.value)


def test_cancelled_while_preempted():
    engine = engine_with(16)
    old, young = (engine.submit([n] * 5, long_decoding(8)) for n in (1, 2))
    while young.slot is not None or young.state.statistics.forwards == 0:
        engine.step()
    answer = young.state.answer()
    engine.cancel(young)
    assert {event.request for event in engine.run()} == {old.id}
    assert young.state.answer() == answer
    assert engine.idle
    assert engine._cache.free_slots == 4
