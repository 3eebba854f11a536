"""Any schedule of arrivals, steps and cancellations gives every request the tokens it gets alone."""

import os
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from decoding_cases import backbone
from digest import DigestBackbone
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.decoding.events import ForwardKind
from fast_dllm.decoding.state import DecodeState
from fast_dllm.engine.engine import Engine
from fast_dllm.errors import FastDLLMError
from fast_dllm.generation import generate_batch

SCHEDULES = int(os.environ.get("FAST_DLLM_SCHEDULES", "500"))
SLOT_LENGTH = 72
MASK = 15
STOPS = (3, 8)
CONVERSATIONS = [torch.randint(0, MASK, (60,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(2)]

decodings = st.builds(
    lambda sampled, policy, cached, **settings: DecodingConfig(**sampled, **policy, **cached, **settings),
    sampled=st.sampled_from([{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}, {"temperature": 1.5, "top_k": 5}]),
    policy=st.sampled_from([{"threshold": 0.6}, {"policy": "factor"}, {"policy": "fixed", "tokens_per_step": 3}]),
    cached=st.sampled_from(
        [
            {},
            *({"sub_block_cache": "dual", "cache_refresh": rule} for rule in ("published", "sub-block", "block")),
            {"sub_block_cache": "prefix"},
        ]
    ),
    max_new_tokens=st.sampled_from([24, 40, 12, 3, 1]),
    stop_token_ids=st.sampled_from([None, ()]),
    fused_commit=st.booleans(),
    verify=st.booleans(),
)
lengths = st.sampled_from([24, 16, 33, 1, 9])
layouts = st.sampled_from([(8, 4), (8, 8), (4, 2), (1, 1), (16, 4)])


class Schedules(RuleBasedStateMachine):
    """One engine, and what it has said of every request."""

    requests = Bundle("requests")
    attentions = ("block", "causal", "block", "causal", "full")

    @staticmethod
    @cache
    def model(attention):
        return DigestBackbone(attention)

    @classmethod
    @cache
    def alone(cls, attention, shift, prompt, decoding):
        config = BlockDiffusionConfig(mask_token_id=MASK, block_size=8, token_shift=shift, context_attention=attention)
        return generate_batch(cls.model(attention), config, [prompt], decoding, STOPS)

    @initialize(data=st.data())
    def start(self, data):
        self.attention = data.draw(st.sampled_from(self.attentions), label="attention")
        self.shift = data.draw(st.sampled_from([True, True, False]), label="shift")
        self.slots = data.draw(st.sampled_from([3, 4, 2, 1]), label="slots")
        self.budget = data.draw(st.sampled_from([72, 96, 80, 64, None, 40]), label="budget")
        self.chunk = data.draw(st.sampled_from([1, 5, 8, 20, 512, None]), label="chunk")
        self.drafts = data.draw(st.sampled_from([None, 6, 1, 16]), label="draft budget")
        self.config = BlockDiffusionConfig(
            mask_token_id=MASK, block_size=8, token_shift=self.shift, context_attention=self.attention
        )
        self.engine = Engine(
            self.model(self.attention),
            self.config,
            slots=self.slots,
            max_length=SLOT_LENGTH,
            stop_token_ids=STOPS,
            token_budget=self.budget,
            prefill_chunk=self.chunk,
            prefix_cache=data.draw(st.sampled_from([True, True, False]), label="prefix cache"),
            draft_budget=self.drafts,
        )
        self.submitted, self.events = [], {}

    def submit(self, prompt, decoding):
        capacity = DecodeState(prompt, self.config, decoding, STOPS).capacity
        if capacity > min(SLOT_LENGTH, self.budget or SLOT_LENGTH):
            with pytest.raises(FastDLLMError, match=f"needs {capacity} positions"):
                self.engine.submit(prompt, decoding)
            return None
        request = self.engine.submit(prompt, decoding)
        self.submitted.append((request, tuple(prompt), decoding))
        self.events[request.id] = []
        return request

    def settings_for(self, decoding, layout):
        block, small = (None, layout[1]) if self.attention == "full" else layout
        verify = decoding.verify and self.attention == "causal" and self.shift
        return replace(decoding, block_size=block, small_block_size=small, verify=verify)

    @rule(
        target=requests,
        conversation=st.integers(0, 1),
        known=lengths,
        own=st.lists(st.integers(0, 14), max_size=3),
        decoding=decodings,
        layout=layouts,
    )
    def arrive(self, conversation, known, own, decoding, layout):
        return self.submit([*CONVERSATIONS[conversation][:known], *own], self.settings_for(decoding, layout))

    @rule(prompts=st.lists(st.tuples(st.integers(0, 1), lengths), min_size=2, max_size=4), decoding=decodings)
    def arrive_together(self, prompts, decoding):
        for conversation, known in prompts:
            self.submit(CONVERSATIONS[conversation][:known], self.settings_for(decoding, (8, 4)))

    @rule(target=requests, earlier=requests, said=st.lists(st.integers(0, 14), max_size=9))
    def next_turn(self, earlier, said):
        if earlier is None:
            return None
        state = earlier.state
        return self.submit([*state.settled_ids(0, state.settled), *said], earlier.decoding)

    @rule(request=requests)
    def cancel(self, request):
        if request is not None:
            self.engine.cancel(request)
            assert request.slot is None

    @rule(ticks=st.sampled_from([1, 2, 5, 12]))
    def step(self, ticks):
        for _ in range(ticks):
            self.tick()

    def tick(self):
        idle = self.engine.idle
        events = self.engine.step()
        assert idle == (not events)
        assert len({event.request for event in events}) == len(events)
        prefills = [event.query_tokens for event in events if event.kind == "prefill"]
        if self.chunk is not None:
            assert len(prefills) < 2 or sum(prefills) <= self.chunk
            assert all(length <= max(self.chunk, 16) for length in prefills)
        for event in events:
            before = self.events[event.request]
            assert not before or (before[-1].finish is None and before[-1].settled <= event.settled)
            before.append(event)

    @invariant()
    def slots_are_held_once(self):
        if not hasattr(self, "engine"):
            return
        free = self.engine._cache.available
        held = [request.slot for request, _, _ in self.submitted if request.slot is not None]
        assert sorted([*held, *free]) == list(range(self.slots))

    @invariant()
    def budget_is_kept(self):
        if not hasattr(self, "engine"):
            return
        running = [request for request, _, _ in self.submitted if request.slot is not None]
        assert all(request.held >= request.state.committed for request in running)
        held = sum(request.held for request, _, _ in self.submitted)
        assert held == sum(request.held for request in running) == self.engine._scheduler._held
        assert self.budget is None or held <= self.budget

    @invariant()
    def nobody_overtakes(self):
        if hasattr(self, "engine"):
            scheduler = self.engine._scheduler
            order = [request.id for request in (*scheduler.running, *scheduler.waiting)]
            assert order == sorted(order)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if self.engine.idle:
                break
            self.tick()
        assert self.engine.idle
        self.slots_are_held_once()
        for request, prompt, decoding in self.submitted:
            self.check(request, prompt, decoding)

    def check(self, request, prompt, decoding):
        state = request.state
        revealed = [token for event in self.events[request.id] for token in zip(event.positions, event.tokens)]
        positions = [position for position, _ in revealed]
        assert decoding.verify or len(set(positions)) == len(positions), "a token was told twice"
        told = dict(revealed)
        assert [told[position] for position in range(len(prompt), state.settled)] == state.answer()
        alone = self.alone(self.attention, self.shift, prompt, decoding)
        if state.finish == "cancelled":
            assert state.answer() == alone.answers[0][: len(state.answer())]
            return
        assert state.answer() == alone.answers[0]
        assert state.finish == alone.finish[0]
        assert self.events[request.id][-1].finish == state.finish
        if decoding.verify and self.drafts is not None:
            return  # how far it drafts, and so how often it runs, depends on who else runs
        expected, found = alone.statistics[0], state.statistics
        # A first look may find what is before its block committed, or may have to commit it.
        looks = {ForwardKind.BLOCK, ForwardKind.COMMIT_BLOCK}
        for kinds in (looks, {ForwardKind.SUB_BLOCK}, {ForwardKind.COMMIT}):
            assert sum(found.forwards_by_kind[kind] - expected.forwards_by_kind[kind] for kind in kinds) == 0
        prefilled = found.query_tokens_by_kind["prefill"] + found.reused_tokens
        assert prefilled >= expected.query_tokens_by_kind["prefill"]


class TinyModelSchedules(Schedules):
    """The same over a transformer in float64."""

    @staticmethod
    @cache
    def model(attention):
        return backbone("qwen3", attention)


QUIET = {"suppress_health_check": list(HealthCheck)}

TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(max_examples=SCHEDULES, stateful_step_count=12, **QUIET)

TestTinyModelSchedules = TinyModelSchedules.TestCase
TestTinyModelSchedules.settings = settings(max_examples=40, stateful_step_count=12, **QUIET)
