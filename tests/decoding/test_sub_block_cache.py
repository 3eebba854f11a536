"""When a whole-block forward renews the sub-block cache, and what each kind of forward runs over."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding_cases import MASK, Case, tokens
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.decoding.events import ForwardKind

BLOCK, SUB = 32, 8
DENOISING = (ForwardKind.BLOCK, ForwardKind.SUB_BLOCK)


def run(prompt_length, *, shift=True, cache="dual", refresh="sub-block", threshold=0.5, small=SUB):
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=BLOCK, token_shift=shift)
    decoding = DecodingConfig(
        max_new_tokens=75,
        small_block_size=small,
        threshold=threshold,
        sub_block_cache=cache,
        cache_refresh=refresh,
        stop_token_ids=(),
    )
    case = Case("qwen3", config, tokens(prompt_length, prompt_length), decoding)
    events = []
    result = case.decode(on_event=events.append)
    assert len(result.answers[0]) == 75
    return result, events


def replay(events, prompt_length):
    """Each denoising event with its sub-block's start and what was masked before it."""
    block = prompt_length // BLOCK * BLOCK
    masked = set(range(prompt_length, block + BLOCK))
    for event in events:
        if event.kind is ForwardKind.COMMIT:
            block += BLOCK
            masked = set(range(block, block + BLOCK))
        if event.kind in DENOISING:
            yield event, min(masked) // SUB * SUB, frozenset(masked)
        masked -= set(event.positions)


shifts = pytest.mark.parametrize("shift", [True, False])
lengths = pytest.mark.parametrize("prompt_length", [1, 30, 32, 33, 71])


@shifts
@lengths
@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_published_rule_refreshes_at_a_new_block_and_while_the_first_position_is_masked(cache, prompt_length, shift):
    _, events = run(prompt_length, shift=shift, cache=cache, refresh="published")
    seen = set()
    for event, sub_start, masked in replay(events, prompt_length):
        block = sub_start // BLOCK
        refreshed = block not in seen or sub_start in masked
        assert event.kind is (ForwardKind.BLOCK if refreshed else ForwardKind.SUB_BLOCK)
        seen.add(block)


@shifts
@lengths
@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_sub_block_rule_runs_exactly_one_block_forward_per_sub_block(cache, prompt_length, shift):
    result, events = run(prompt_length, shift=shift, cache=cache)
    steps = [(sub_start, event.kind) for event, sub_start, _ in replay(events, prompt_length)]
    visited = list(dict.fromkeys(sub_start for sub_start, _ in steps))
    for sub_start in visited:
        first, *rest = [kind for start, kind in steps if start == sub_start]
        assert first is ForwardKind.BLOCK
        assert set(rest) <= {ForwardKind.SUB_BLOCK}
    assert result.total.forwards_by_kind["block"] == len(visited)


@shifts
@lengths
@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_block_rule_runs_exactly_one_block_forward_per_block(cache, prompt_length, shift):
    _, events = run(prompt_length, shift=shift, cache=cache, refresh="block")
    steps = [(sub_start // BLOCK, event.kind) for event, sub_start, _ in replay(events, prompt_length)]
    blocks = Counter(block for block, kind in steps if kind is ForwardKind.BLOCK)
    assert blocks == dict.fromkeys({block for block, _ in steps}, 1)


@shifts
@pytest.mark.parametrize("refresh", ["published", "sub-block", "block"])
@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_query_tokens_of_each_kind_of_forward(cache, refresh, shift):
    _, events = run(45, shift=shift, cache=cache, refresh=refresh, threshold=0.95)
    kinds = Counter(event.kind for event in events)
    assert kinds[ForwardKind.SUB_BLOCK] > 5
    for event in events:
        if event.kind is not ForwardKind.SUB_BLOCK:
            assert event.query_tokens == 32
    last = ()
    for event, sub_start, _ in replay(events, 45):
        if event.kind is ForwardKind.SUB_BLOCK:
            start = sub_start
            if refresh != "published" and sub_start % BLOCK > 0:
                # Where the shifted logit of the first token stands, and what the forward before revealed.
                start = min(sub_start - shift, *last, sub_start)
            width = SUB if cache == "dual" else BLOCK - sub_start % BLOCK
            assert event.query_tokens == width + sub_start - start
        last = event.positions


@shifts
def test_what_was_revealed_last_is_recomputed_in_the_next_sub_block(shift):
    """Its K/V are still a mask's: the window reaches back to it, under every rule but the published one."""
    _, events = run(45, shift=shift, refresh="block", threshold=0.95)
    crossings = 0
    for before, event in pairwise(events):
        if event.kind is ForwardKind.SUB_BLOCK and min(before.positions) // SUB != min(event.positions) // SUB:
            crossings += 1
            assert event.query_tokens > SUB + shift
    assert crossings > 3


def test_no_cache_runs_whole_blocks_only():
    _, events = run(45, cache="none")
    assert {event.kind for event in events} == {ForwardKind.PREFILL, ForwardKind.BLOCK, ForwardKind.COMMIT}


@settings(max_examples=30)
@given(
    st.integers(1, 80),
    st.booleans(),
    st.sampled_from(["dual", "prefix"]),
    st.sampled_from(["published", "sub-block", "block"]),
    st.sampled_from([0.3, 0.5, 0.9]),
)
def test_sub_block_as_large_as_the_block_makes_the_cache_exact(prompt_length, shift, cache, refresh, threshold):
    settings = {"shift": shift, "threshold": threshold, "small": BLOCK}
    cached, _ = run(prompt_length, cache=cache, refresh=refresh, **settings)
    exact, _ = run(prompt_length, cache="none", **settings)
    assert cached.answers == exact.answers
    assert cached.total.forwards == exact.total.forwards


def test_sub_block_cache_saves_query_tokens():
    exact, _ = run(45, cache="none", threshold=1.0)
    dual, _ = run(45, cache="dual", threshold=1.0)
    assert sum(dual.total.query_tokens_by_kind.values()) < 0.6 * sum(exact.total.query_tokens_by_kind.values())
