"""Block size 1 is autoregressive decoding."""

import pytest
import torch

from decoding_cases import MASK, Case, tokens
from fast_dllm.checkpoint import AUTOREGRESSIVE
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.generation import generate_batch
from fast_dllm.model.hf import HFBackbone
from tiny import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_size_one_equals_greedy_generate_of_transformers(architecture):
    model = tiny_model(architecture)
    prompts = [tokens(length, length) for length in (1, 6, 31, 64)]
    decoding = DecodingConfig(max_new_tokens=24)
    ours = generate_batch(HFBackbone(model, "causal"), AUTOREGRESSIVE, prompts, decoding, stop_token_ids=(3,))
    for prompt, answer in zip(prompts, ours.answers, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=3, pad_token_id=1
        )
        assert answer == theirs[0, len(prompt) :].tolist()


def test_every_forward_gives_exactly_one_token():
    model = HFBackbone(tiny_model("llama"), "causal")
    prompts = [tokens(length, length) for length in (1, 5, 40)]
    result = generate_batch(model, AUTOREGRESSIVE, prompts, DecodingConfig(max_new_tokens=17))
    for statistics in result.statistics:
        assert statistics.tokens_per_forward == 1.0
        assert statistics.forwards_by_kind == {"prefill": 1, "commit": 16}


@pytest.mark.parametrize("attention", ["block", "causal"])
def test_block_diffusion_checkpoint_decodes_autoregressively_at_block_size_one(attention):
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=32, context_attention=attention)
    decoding = DecodingConfig(max_new_tokens=20, block_size=1, small_block_size=1, stop_token_ids=())
    case = Case("qwen2", config, tokens(8, 20), decoding)
    result = case.decode()
    assert result.answers == [case.reference()]
    assert result.total.tokens_per_forward == 1.0
