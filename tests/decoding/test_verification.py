"""A verified answer is the autoregressive one, whatever was drafted."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding_cases import MASK, Case, confident_model, decode, decodings, prompts, tokens
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.errors import FastDLLMError
from tiny import ARCHITECTURES

CAUSAL = BlockDiffusionConfig(mask_token_id=MASK, block_size=32, context_attention="causal")


@contextmanager
def always_saying(model, token):
    """The model with a head that makes one token certain."""
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, __, logits: logits * 0 + 100 * F.one_hot(torch.tensor(token), 64))
    try:
        yield
    finally:
        handle.remove()


def autoregressive(decoding):
    return replace(decoding, block_size=1, small_block_size=1, verify=False)


@st.composite
def verified_cases(draw):
    decoding = replace(draw(decodings(cached=True)), verify=True)
    return Case(draw(st.sampled_from(list(ARCHITECTURES))), CAUSAL, draw(prompts), decoding)


def test_a_verified_answer_is_the_autoregressive_one_sampled_or_not():
    withdrawn = kept = stopped = 0

    @settings(max_examples=450)
    @given(verified_cases())
    def check(case):
        nonlocal withdrawn, kept, stopped
        result = case.decode()
        alone = decode(case, [case.prompt], [autoregressive(case.decoding)])
        assert (result.answers, result.finish) == (alone.answers, alone.finish)
        withdrawn += result.total.withdrawn_tokens
        kept += result.total.new_tokens
        stopped += result.finish == ["stop"]

    check()
    # Drafts that are never refused, or always, would prove little.
    assert withdrawn > 1000
    assert kept > 1000
    assert stopped > 30


@settings(max_examples=40)
@given(verified_cases(), st.data())
def test_rows_of_a_batch_are_verified_as_if_alone(case, data):
    asked = data.draw(st.lists(prompts, min_size=2, max_size=5))
    wanted = [data.draw(decodings(cached=True)) for _ in asked]
    wanted = [replace(decoding, verify=data.draw(st.booleans())) for decoding in wanted]
    together = decode(case, asked, wanted, max_batch=3)
    for prompt, decoding, answer in zip(asked, wanted, together.answers, strict=True):
        assert decode(case, [prompt], [decoding]).answers == [answer]


def test_what_is_shown_is_never_taken_back():
    case = Case("llama", CAUSAL, tokens(3, 20), DecodingConfig(max_new_tokens=60, threshold=0.2, stop_token_ids=()))
    shown, latest, withdrawn = [], {}, 0

    def watch(event):
        nonlocal withdrawn
        latest.update(zip(event.positions, event.tokens, strict=True))
        shown.extend(latest[position] for position in range(20 + len(shown), event.settled))
        withdrawn += event.withdrawn

    result = case.decode(on_event=watch)
    assert shown == result.answers[0]
    assert withdrawn == result.total.withdrawn_tokens > 0
    # Every token told is the answer's, or was taken back.
    assert result.total.revealed_tokens - withdrawn == len(shown) == 60


def test_no_position_behind_the_limit_is_computed():
    case = Case("llama", CAUSAL, tokens(3, 20), DecodingConfig(max_new_tokens=11, stop_token_ids=()))
    case.decode(on_event=(events := []).append)
    assert sum(event.query_tokens for event in events[:1]) == 20 + 7
    assert max(event.query_tokens for event in events[1:]) <= 10
    single = replace(case.decoding, max_new_tokens=1)
    assert decode(case, [case.prompt], [single]).total.query_tokens_by_kind == {"commit": 20}


def test_drafts_that_are_right_take_one_forward_each():
    """A model that says one token whatever it sees drafts what it would have said."""
    model = confident_model("llama", torch.float64)
    answer = Case("llama", CAUSAL, tokens(3, 20), DecodingConfig(max_new_tokens=33, stop_token_ids=()))
    with always_saying(model, 7):
        result = answer.decode()
    assert result.answers == [[7] * 33]
    # Four looks draft 8 tokens each; the forward that verifies the last of them says the 33rd.
    assert result.total.forwards_by_kind == {"commit_block": 4, "commit": 1}
    assert result.total.withdrawn_tokens == 0


def test_verification_is_what_a_model_with_an_autoregressive_answer_does_unless_told():
    case = Case("llama", CAUSAL, tokens(1, 9), DecodingConfig(max_new_tokens=40, threshold=0.3))
    told = replace(case.decoding, verify=True)
    assert case.decode().statistics == decode(case, [case.prompt], [told]).statistics
    assert decode(case, [case.prompt], [replace(told, verify=False)]).total.withdrawn_tokens == 0


@pytest.mark.parametrize("attention", ["block", "full"])
def test_a_model_without_an_autoregressive_answer_is_refused(attention):
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=8, context_attention=attention)
    with pytest.raises(FastDLLMError, match="autoregressive answer"):
        Case("llama", config, tokens(1, 9), DecodingConfig(verify=True)).decode()


def test_the_threshold_is_lower_where_it_does_not_decide_the_answer():
    causal, block = (BlockDiffusionConfig(mask_token_id=63, context_attention=kind) for kind in ("causal", "block"))
    assert DecodingConfig().threshold_on(causal) < DecodingConfig().threshold_on(block) == 0.9
    assert DecodingConfig(verify=False).threshold_on(causal) == 0.9
    assert DecodingConfig(threshold=0.3).threshold_on(causal) == 0.3
