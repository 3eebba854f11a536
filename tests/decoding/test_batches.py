"""A row's result does not depend on its neighbours."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding_cases import MASK, Case, decode, decodings, models, prompts, tokens
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.model.hf import HFBackbone
from fast_dllm.model.native import NativeBackbone


@st.composite
def ragged_batches(draw):
    architecture, config = draw(models())
    full = config.context_attention == "full"
    rows = draw(st.integers(2, 5))
    cases = [
        Case(architecture, config, draw(prompts), draw(decodings(full=full, cached=True, longest=50)))
        for _ in range(rows)
    ]
    return cases, draw(st.integers(1, rows))


@settings(max_examples=60)
@given(ragged_batches())
def test_row_in_a_ragged_batch_equals_the_row_alone(batch):
    assert_rows_are_as_alone(*batch, kind=HFBackbone)


@settings(max_examples=200)
@given(ragged_batches())
def test_row_in_a_ragged_batch_of_the_native_backbone_equals_the_row_alone(batch):
    assert_rows_are_as_alone(*batch, kind=NativeBackbone)


def assert_rows_are_as_alone(cases, max_batch, kind):
    prompts, settings = [case.prompt for case in cases], [case.decoding for case in cases]
    together = decode(cases[0], prompts, settings, kind, max_batch=max_batch)
    for row, case in enumerate(cases):
        alone = case.decode(kind=kind)
        assert together.answers[row] == alone.answers[0]
        assert together.finish[row] == alone.finish[0]
        assert together.reveal_steps[row] == alone.reveal_steps[0]
        assert together.confidences[row] == pytest.approx(alone.confidences[0], abs=1e-9)
        assert together.statistics[row] == alone.statistics[0]


@pytest.mark.parametrize("refresh", ["published", "sub-block", "block"])
@pytest.mark.parametrize("cache", ["none", "dual", "prefix"])
def test_every_sub_block_cache_is_independent_of_the_batch(cache, refresh):
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=32)
    decoding = DecodingConfig(
        max_new_tokens=45, threshold=0.5, sub_block_cache=cache, cache_refresh=refresh, stop_token_ids=()
    )
    cases = [Case("qwen3", config, tokens(length, length), decoding) for length in (1, 31, 32, 33, 64, 77)]
    together = decode(cases[0], [case.prompt for case in cases], [decoding] * len(cases), max_batch=4)
    assert together.answers == [case.decode().answers[0] for case in cases]


def test_shared_settings_give_each_sampled_row_its_own_seed():
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=8)
    decoding = DecodingConfig(max_new_tokens=20, temperature=1.0, threshold=0.5, seed=7, stop_token_ids=())
    prompt = tokens(1, 12)
    case = Case("llama", config, prompt, decoding)
    together = decode(case, [prompt, prompt], decoding)
    next_seed = DecodingConfig(**{**decoding.to_dict(), "seed": 8})
    assert together.answers == [case.decode().answers[0], decode(case, [prompt], [next_seed]).answers[0]]
    assert together.answers[0] != together.answers[1]
