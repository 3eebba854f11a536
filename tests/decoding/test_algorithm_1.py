"""Algorithm 1 of arXiv 2505.22618: full attention, one block over the canvas, windows as sub-blocks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding_cases import MASK, Case, confident_model, tokens
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig


@torch.inference_mode()
def algorithm_1(model, prompt, length, window, reveal, shift):
    """The listing, without its cache: every step runs the whole canvas under full attention."""
    x = torch.tensor([[*prompt, *[MASK] * length]])
    everyone = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool)
    for start in range(len(prompt), x.shape[1], window):
        end = min(start + window, x.shape[1])
        while (x[0, start:end] == MASK).any():
            logits = model(input_ids=x, attention_mask=everyone, use_cache=False).logits[0]
            if shift:
                logits = torch.cat([logits[:1], logits[:-1]])
            probability = logits.softmax(-1)
            probability[:, MASK] = -1
            confidence, token = probability.max(-1)
            masked = [i for i in range(start, end) if x[0, i] == MASK]
            for i in reveal({i: confidence[i].item() for i in masked}):
                x[0, i] = token[i]
    return x[0, len(prompt) :].tolist()


def threshold(tau):
    def reveal(confidence):
        best = max(confidence, key=lambda i: (confidence[i], -i))
        return {best} | {i for i, c in confidence.items() if c > tau}

    return reveal


def factor(f):
    def reveal(confidence):
        order = sorted(confidence, key=lambda i: (-confidence[i], i))
        n = 1
        while n < len(order) and (n + 2) * (1 - confidence[order[n]]) < f:
            n += 1
        return order[:n]

    return reveal


def full_attention(shift, prompt, architecture="qwen3", **settings):
    config = BlockDiffusionConfig(mask_token_id=MASK, token_shift=shift, context_attention="full")
    return Case(architecture, config, prompt, DecodingConfig(stop_token_ids=(), **settings))


@settings(max_examples=40)
@given(
    st.sampled_from(["qwen2", "qwen3", "llama"]),
    st.booleans(),
    st.integers(1, 60),
    st.integers(1, 48),
    st.integers(1, 20),
    st.sampled_from([("threshold", 0.5), ("threshold", 0.8), ("factor", 1.0), ("factor", 2.0)]),
)
def test_decoding_without_cache_equals_the_listing(architecture, shift, prompt_length, length, window, policy):
    name, value = policy
    case = full_attention(
        shift,
        tokens(prompt_length, prompt_length),
        architecture,
        max_new_tokens=length,
        small_block_size=window,
        policy=name,
        **{name: value},
    )
    reveal = threshold(value) if name == "threshold" else factor(value)
    expected = algorithm_1(confident_model(architecture), case.prompt, length, window, reveal, shift)
    assert case.decode().answers == [expected]


@pytest.mark.parametrize("cache", ["dual", "prefix"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(("length", "window"), [(64, 16), (50, 16), (7, 32), (33, 32)])
def test_cache_is_refreshed_by_one_canvas_forward_per_window(length, window, shift, cache):
    case = full_attention(
        shift, tokens(1, 21), max_new_tokens=length, small_block_size=window, threshold=0.95, sub_block_cache=cache
    )
    events = []
    result = case.decode(on_event=events.append)
    assert len(result.answers[0]) == length
    kinds = result.total.forwards_by_kind
    assert kinds["block"] == math.ceil(length / window)
    assert result.total.query_tokens_by_kind["block"] == kinds["block"] * (21 + length)
    assert kinds["sub_block"] > 0
    assert set(kinds) == {"block", "sub_block"}
    for event in events:
        if event.kind.value == "sub_block":
            start = 21 + (min(event.positions) - 21) // window * window
            end = 21 + length if cache == "prefix" else min(start + window, 21 + length)
            assert event.query_tokens == end - start + shift


@pytest.mark.parametrize("cache", ["dual", "prefix"])
@pytest.mark.parametrize("shift", [True, False])
def test_one_window_over_the_answer_keeps_only_the_prompt_stale(shift, cache):
    case = full_attention(
        shift, tokens(1, 21), max_new_tokens=24, small_block_size=24, threshold=0.6, sub_block_cache=cache
    )
    first = []
    case.decode(on_event=first.append)
    exact = []
    full_attention(shift, tokens(1, 21), max_new_tokens=24, small_block_size=24, threshold=0.6).decode(
        on_event=exact.append
    )
    # The refresh itself is exact.
    assert first[0].tokens == exact[0].tokens
    assert first[0].confidences == pytest.approx(exact[0].confidences)


def test_window_defaults_to_the_paper_s_32_or_the_whole_answer():
    for length, windows in ((20, 1), (32, 1), (33, 2)):
        case = full_attention(True, tokens(1, 5), max_new_tokens=length, sub_block_cache="dual")
        assert case.decode().total.forwards_by_kind["block"] == windows
