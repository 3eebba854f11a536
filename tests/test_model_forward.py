import pytest
import torch

from fast_dllm.masks import dense_mask, sequence_tokens
from fast_dllm.model.forward import head_logits, hidden_states
from tiny import ARCHITECTURES, tiny_model


def block_causal_logits(model, ids):
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    mask = dense_mask(sequence_tokens(positions, 8), "block")
    with torch.no_grad():
        return head_logits(model, hidden_states(model, ids, positions, mask))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_eager_attention_sees_what_sdpa_sees(architecture):
    model = tiny_model(architecture, dtype=torch.float64)
    ids = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    with_sdpa = block_causal_logits(model, ids)
    model.set_attn_implementation("eager")
    # transformers' eager softmax is float32 whatever the model's dtype.
    torch.testing.assert_close(block_causal_logits(model, ids), with_sdpa, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
        ("gemma2", {"final_logit_softcapping": 3.0, "attn_logit_softcapping": None, "head_dim": 8}),
    ],
)
def test_logits_are_scaled_as_the_family_scales_them(family, scaling):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=1,
        **scaling,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    ids = torch.randint(0, 60, (1, 12))
    positions = torch.arange(12)[None]
    mask = dense_mask(sequence_tokens(positions, 1), "causal")
    with torch.no_grad():
        ours = head_logits(model, hidden_states(model, ids, positions, mask))
        torch.testing.assert_close(ours, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
