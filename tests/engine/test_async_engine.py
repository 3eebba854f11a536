"""Streams over one engine in its own thread: the tokens of `generate_batch`, and nobody is left waiting."""

import asyncio
import threading
from contextlib import aclosing

import pytest

from decoding_cases import MASK, STOPS, backbone, tokens
from digest import DigestBackbone
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.decoding.events import Statistics
from fast_dllm.engine.async_engine import AsyncEngine
from fast_dllm.engine.engine import Engine
from fast_dllm.errors import FastDLLMError
from fast_dllm.generation import generate_batch

CONFIG = BlockDiffusionConfig(mask_token_id=15, block_size=4)
ENDLESS = DecodingConfig(max_new_tokens=4000, policy="sequential", stop_token_ids=())


def engine_with(slots, **settings):
    return Engine(DigestBackbone(), CONFIG, slots=slots, max_length=4096, **settings)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def events_of(engine, prompt, decoding):
    return [event async for event in engine.stream(prompt, decoding)]


def answer_of(events, prompt):
    told = {position: token for event in events for position, token in zip(event.positions, event.tokens, strict=True)}
    return [told[position] for position in range(len(prompt), events[-1].settled)]


async def idle(engine):
    while not engine.idle:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("settings", [{}, {"token_budget": 120, "prefill_chunk": 16}, {"prefix_cache": False}])
def test_many_streams_equal_generate_batch(settings):
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=8)
    model = backbone("qwen2")
    prompts = [tokens(n % 5, 10 + 3 * n) for n in range(12)]
    decodings = [DecodingConfig(max_new_tokens=12 + n, threshold=0.5, temperature=n % 2, seed=n) for n in range(12)]
    expected = generate_batch(model, config, prompts, decodings, STOPS)

    async def main():
        engine = Engine(model, config, slots=4, max_length=80, stop_token_ids=STOPS, **settings)
        async with AsyncEngine(engine) as streams:
            pairs = zip(prompts, decodings, strict=True)
            return await asyncio.gather(*(events_of(streams, prompt, decoding) for prompt, decoding in pairs))

    results = run(main())
    for number, (prompt, events) in enumerate(zip(prompts, results, strict=True)):
        assert answer_of(events, prompt) == expected.answers[number]
        assert events[-1].finish == expected.finish[number]
        counted = Statistics()
        for event in events:
            counted.count(event)
        assert counted.revealed_tokens == expected.statistics[number].revealed_tokens


def test_streams_share_forwards():
    async def main():
        engine = engine_with(8)
        async with AsyncEngine(engine) as streams:
            await asyncio.gather(*(events_of(streams, [n], DecodingConfig(max_new_tokens=40)) for n in range(8)))
        return engine

    model = run(main())._backbone
    alone = DigestBackbone()
    for n in range(8):
        generate_batch(alone, CONFIG, [[n]], DecodingConfig(max_new_tokens=40))
    assert model.calls < alone.calls / 2


def test_leaving_early_cancels_the_request_within_a_step():
    async def main():
        engine = engine_with(1)
        ticks = []
        step = engine.step
        engine.step = lambda: ticks.append(1) or step()
        async with AsyncEngine(engine) as streams:
            async with aclosing(streams.stream([1], ENDLESS)) as events:
                async for event in events:
                    if event.settled > 20:
                        break
            left = len(ticks)
            await idle(engine)
            assert engine._cache.free_slots == 1
            # One tick may have been running, and one begun before the command arrived.
            assert len(ticks) <= left + 2
            events = await events_of(streams, [1], DecodingConfig(max_new_tokens=9, stop_token_ids=()))
            assert events[-1].finish == "length"

    run(main())


def test_break_without_closing_cancels_too():
    async def main():
        engine = engine_with(1)
        async with AsyncEngine(engine) as streams:
            async for _ in streams.stream([1], ENDLESS):
                break
            await idle(engine)
            assert engine._cache.free_slots == 1

    run(main())


def test_cancelled_task_cancels_its_request_running_or_waiting():
    async def main():
        engine = engine_with(1)
        async with AsyncEngine(engine) as streams:
            tasks = [asyncio.create_task(events_of(streams, [n], ENDLESS)) for n in range(3)]
            await asyncio.sleep(0.02)
            assert not engine.idle
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in done)
            await idle(engine)
            assert engine._cache.free_slots == 1

    run(main())


def test_refused_request_harms_nobody():
    async def main():
        async with AsyncEngine(engine_with(2)) as streams:
            other = asyncio.create_task(events_of(streams, [1], DecodingConfig(max_new_tokens=50)))
            with pytest.raises(FastDLLMError, match="empty prompt"):
                await events_of(streams, [], ENDLESS)
            with pytest.raises(FastDLLMError, match="a cache slot has 4096"):
                await events_of(streams, [1] * 200, ENDLESS)
            with pytest.raises(FastDLLMError, match="token id 16 is not in the vocabulary"):
                await events_of(streams, [1, 16], ENDLESS)
            with pytest.raises(FastDLLMError, match="stop_strings need text"):
                await events_of(streams, [1], DecodingConfig(stop_strings=("x",)))
            assert (await other)[-1].finish is not None

    run(main())


def test_error_in_a_tick_reaches_every_consumer_and_all_later_ones():
    async def main():
        engine = engine_with(2)
        async with AsyncEngine(engine) as streams:
            tasks = [asyncio.create_task(events_of(streams, [n], ENDLESS)) for n in range(4)]
            await asyncio.sleep(0.02)
            engine._backbone.fail = True
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, MemoryError)
            with pytest.raises(MemoryError, match="out of memory"):
                await events_of(streams, [1], ENDLESS)
            assert engine._cache.free_slots == 2

    run(main())


def test_error_before_a_request_has_its_slot_reaches_every_consumer():
    async def main():
        engine = engine_with(2)

        def refuse(*_):
            raise MemoryError("no slot")

        async with AsyncEngine(engine) as streams:
            running = asyncio.create_task(events_of(streams, [1], ENDLESS))
            await asyncio.sleep(0.02)
            engine._cache.allocate = refuse
            late = asyncio.create_task(events_of(streams, [2], ENDLESS))
            for result in await asyncio.gather(running, late, return_exceptions=True):
                assert isinstance(result, MemoryError)
            assert engine.idle

    run(main())


def test_closing_ends_streams_and_thread():
    async def main():
        engine = engine_with(1)
        async with AsyncEngine(engine) as streams:
            tasks = [asyncio.create_task(events_of(streams, [n], ENDLESS)) for n in range(3)]
            await asyncio.sleep(0.02)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, FastDLLMError)
            assert str(result) == "the engine was closed"
        with pytest.raises(FastDLLMError, match="the engine was closed"):
            await events_of(streams, [1], ENDLESS)
        assert engine.idle
        assert engine._cache.free_slots == 1

    before = threading.active_count()
    run(main())
    assert threading.active_count() <= before
    assert not [thread for thread in threading.enumerate() if thread.name == "fast-dllm-engine"]


def test_stream_before_entering_is_refused():
    with pytest.raises(FastDLLMError, match="use 'async with'"):
        run(events_of(AsyncEngine(engine_with(1)), [1], ENDLESS))
