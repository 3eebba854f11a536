"""The engine: slots, queues, arrivals and cancellation."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.engine.engine import Engine
from fast_dllm.errors import FastDLLMError
from scripted import ScriptedBackbone

CONFIG = BlockDiffusionConfig(mask_token_id=15, block_size=4)
STOP = 3


def engine_with(slots, *, max_length=64, script=lambda position, _: (position % 3, 0.6)):
    model = ScriptedBackbone(script)
    return Engine(model, CONFIG, slots=slots, max_length=max_length, stop_token_ids=(STOP,)), model


def free_slots(engine):
    return engine._cache.free_slots


def expected(prompt, length):
    return [position % 3 for position in range(len(prompt), len(prompt) + length)]


def test_requests_beyond_the_slots_wait_and_finish():
    engine, model = engine_with(2)
    requests = [engine.submit([1] * (n + 1), DecodingConfig(max_new_tokens=6 + n)) for n in range(7)]
    events = list(engine.run())
    for n, request in enumerate(requests):
        assert request.state.answer() == expected([1] * (n + 1), 6 + n)
        assert request.state.finish == "length"
    assert max(len(batch.rows) for batch in model.batches) <= 2
    assert sorted({event.request for event in events}) == list(range(7))
    assert engine.idle
    assert free_slots(engine) == 2


def test_requests_start_first_come_first_served():
    engine, _ = engine_with(1)
    for _ in range(3):
        engine.submit([1], DecodingConfig(max_new_tokens=5))
    order = [event.request for event in engine.run()]
    assert order == sorted(order)


def test_finished_row_frees_its_slot_at_once():
    engine, _ = engine_with(2)
    short = engine.submit([1], DecodingConfig(max_new_tokens=1))
    long = engine.submit([1], DecodingConfig(max_new_tokens=40))
    waiting = engine.submit([1], DecodingConfig(max_new_tokens=40))
    while short.state.finish is None:
        engine.step()
    assert short.slot is None
    engine.step()
    assert waiting.slot is not None
    assert long.state.finish is None


def test_cancel_frees_the_slot_of_a_running_request():
    engine, _ = engine_with(1)
    running = engine.submit([1], DecodingConfig(max_new_tokens=40))
    waiting = engine.submit([1], DecodingConfig(max_new_tokens=5))
    engine.step()
    assert free_slots(engine) == 0
    engine.cancel(running)
    assert free_slots(engine) == 1
    assert running.state.finish == "cancelled"
    events = list(engine.run())
    assert {event.request for event in events} == {waiting.id}
    assert waiting.state.answer() == expected([1], 5)


def test_cancel_removes_a_waiting_request():
    engine, _ = engine_with(1)
    engine.submit([1], DecodingConfig(max_new_tokens=5))
    waiting = engine.submit([1], DecodingConfig(max_new_tokens=5))
    engine.cancel(waiting)
    assert {event.request for event in engine.run()} == {0}
    assert free_slots(engine) == 1


def test_cancel_twice_or_after_the_end_changes_nothing():
    engine, _ = engine_with(1)
    request = engine.submit([1], DecodingConfig(max_new_tokens=2))
    list(engine.run())
    engine.cancel(request)
    assert request.state.finish == "length"
    other = engine.submit([1], DecodingConfig(max_new_tokens=20))
    engine.step()
    engine.cancel(other)
    engine.cancel(other)
    assert free_slots(engine) == 1


def test_request_may_arrive_between_ticks():
    engine, model = engine_with(4)
    first = engine.submit([1], DecodingConfig(max_new_tokens=20))
    engine.step()
    second = engine.submit([1, 2], DecodingConfig(max_new_tokens=20))
    list(engine.run())
    assert first.state.answer() == expected([1], 20)
    assert second.state.answer() == expected([1, 2], 20)
    assert any(len(batch.rows) == 2 for batch in model.batches)


def test_rows_at_different_stages_share_a_forward():
    engine, model = engine_with(3, script=lambda position, _: (1, 0.95 if position > 20 else 0.2))
    engine.submit([1] * 22, DecodingConfig(max_new_tokens=12))
    engine.submit([1], DecodingConfig(max_new_tokens=12))
    engine.submit([1, 1], DecodingConfig(max_new_tokens=12, block_size=1, small_block_size=1))
    list(engine.run())
    clean = [[row.noisy_from == row.visible_end for row in batch.rows] for batch in model.batches]
    assert any(len(rows) == 3 and {*rows} == {True, False} for rows in clean)
    assert any(len({row.length for row in batch.rows}) > 1 for batch in model.batches)


def test_a_tick_is_one_forward():
    engine, model = engine_with(3)
    for length in (1, 9, 30):
        engine.submit([1] * length, DecodingConfig(max_new_tokens=12))
    ticks = 0
    while not engine.idle:
        engine.step()
        ticks += 1
    assert ticks == len(model.batches)


@pytest.mark.parametrize("name", ["slots", "max_length", "prefill_chunk", "draft_budget"])
def test_sizes_with_which_nothing_would_run_are_refused(name):
    with pytest.raises(FastDLLMError, match=f"{name}=0: must be 1 or more"):
        Engine(ScriptedBackbone(lambda *_: (1, 0.9)), CONFIG, **{"slots": 1, "max_length": 16, name: 0})


def test_request_longer_than_a_slot_is_refused():
    engine, _ = engine_with(1, max_length=16)
    engine.submit([1] * 6, DecodingConfig(max_new_tokens=10))
    with pytest.raises(FastDLLMError, match="needs 20 positions, a cache slot has 16"):
        engine.submit([1] * 7, DecodingConfig(max_new_tokens=10))


def test_request_longer_than_the_model_is_refused():
    model = ScriptedBackbone(lambda *_: (1, 0.9))
    model.max_length = 12
    engine = Engine(model, CONFIG, slots=1, max_length=64)
    engine.submit([1] * 6, DecodingConfig(max_new_tokens=6))
    with pytest.raises(FastDLLMError, match="exceed the model's 12 positions") as error:
        engine.submit([1] * 6, DecodingConfig(max_new_tokens=7))
    assert "\n" not in str(error.value)


def test_idle_engine_steps_without_events():
    engine, _ = engine_with(1)
    assert engine.idle
    assert engine.step() == []


ACTIONS = st.lists(
    st.one_of(st.tuples(st.integers(1, 9), st.integers(1, 12)), st.integers(0, 9), st.none()), max_size=40
)


@settings(max_examples=100)
@given(st.integers(1, 3), ACTIONS)
def test_slots_never_leak(slots, actions):
    def script(position, call):
        return (STOP if (position * 7 + call) % 11 == 0 else 1, 0.6)

    engine, model = engine_with(slots, script=script)
    requests = []
    for action in actions:
        if action is None:
            engine.step()
        elif isinstance(action, tuple):
            prompt_length, limit = action
            requests.append(engine.submit([1] * prompt_length, DecodingConfig(max_new_tokens=limit, threshold=0.5)))
        elif action < len(requests):
            engine.cancel(requests[action])
        held = [request.slot for request in requests if request.slot is not None]
        assert len(set(held)) == len(held) == slots - free_slots(engine)
    list(engine.run())
    assert free_slots(engine) == slots
    assert all(request.state.finish is not None and request.slot is None for request in requests)
    for batch in model.batches:
        assert len({row.slot for row in batch.rows}) == len(batch.rows)
        order = [(row.length, row.slot) for row in batch.rows]
        assert order == sorted(order)
