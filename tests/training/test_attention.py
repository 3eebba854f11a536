"""Families whose attention torch's fused one cannot give are trained with their own."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import flex_attention

from fast_dllm.checkpoint import load_checkpoint
from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.masks import sequence_tokens
from fast_dllm.objective import lay_out
from fast_dllm.training import attention
from fast_dllm.training.adapt import adapt
from fast_dllm.training.lora import wrap_with_lora
from fast_dllm.training.options import AdaptOptions
from fast_dllm.training.recompute import recompute_cheap_operations
from fast_dllm.training.trainer import with_training_forward, without_training_forward
from samples import make_samples
from tiny import save_tiny, tiny_model

CAPPED = {"model_type": "gemma2", "attn_logit_softcapping": 0.5, "final_logit_softcapping": 30.0, "head_dim": 8}
OPTIONS = AdaptOptions(steps=2, batch_size=4, warmup_steps=0, max_length=64, block_size=8, lora_rank=0, probe_items=1)


@pytest.mark.parametrize(("family", "kept"), [({}, "sdpa"), (CAPPED, "eager")])
def test_the_training_loss_is_that_of_the_models_own_forward(family, kept):
    model = tiny_model("llama", **family)
    ids = torch.randint(4, 54, (2, 16), generator=torch.Generator().manual_seed(0))
    loss_mask = torch.arange(16).expand(2, -1) >= 6
    with torch.no_grad():
        own = model(input_ids=ids, labels=ids.masked_fill(~loss_mask, -100)).loss
    config = BlockDiffusionConfig(mask_token_id=63, block_size=8, context_attention="causal")
    streams = lay_out(ids, loss_mask, loss_mask.new_zeros(0, 2, 16), config, with_ar=True)
    arguments = streams._asdict() | {"tokens": torch.stack(streams.tokens)}
    with torch.no_grad():
        ours = with_training_forward(model, "causal")(**arguments)
    assert ours.mean().item() == pytest.approx(own.item(), abs=1e-5)
    assert without_training_forward(model).config._attn_implementation == kept


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_model_that_caps_its_scores_is_trained_saved_and_loaded(tmp_path, lora_rank):
    base = save_tiny(tmp_path / "base", adapted=False, **CAPPED)
    options = replace(OPTIONS, lora_rank=lora_rank)
    result = adapt(base, make_samples(), options, tmp_path / "out", held_out=make_samples(2))
    assert result.loss_after < result.loss_before
    assert load_checkpoint(tmp_path / "out").model.config.attn_logit_softcapping == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_gives_what_torch_gives(monkeypatch, dtype):
    """Both of torch's ways: fewer K/V heads than queries, and K/V repeated where fused attention takes as many only."""
    generator = torch.Generator().manual_seed(0)
    of_heads = (torch.randn(2, heads, 40, 8, generator=generator, dtype=dtype) for heads in (6, 2, 2))
    query, key, value = (x.requires_grad_() for x in of_heads)
    positions = torch.arange(40).expand(2, -1)
    pieces = attention.cut(sequence_tokens(positions, 8), "block", piece=16)

    def attended(of_values=value):
        out = attention.attend(query, key, of_values, pieces)
        return out, *torch.autograd.grad(out.square().sum(), (query, key, of_values))

    by_kernel, narrow = attended(), attended(value[..., :4])
    monkeypatch.setattr(attention, "_has_kernel", lambda query, value: False)
    grouped = attended()
    monkeypatch.setattr(attention, "_groups_heads", lambda device: False)
    for one, other, repeated in zip(by_kernel, grouped, attended(), strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one, repeated)
    # Values narrower than keys, which the kernel does not take.
    torch.testing.assert_close(narrow[0], by_kernel[0][..., :4])


def streams_of(length, config):
    ids = torch.randint(4, 54, (2, length), generator=torch.Generator().manual_seed(length))
    views = torch.rand(2, 2, length, generator=torch.Generator().manual_seed(0)) < 0.5
    document_ids = (torch.arange(length) >= length // 2).long().expand(2, -1)
    return lay_out(ids, torch.ones_like(ids, dtype=torch.bool), views, config, document_ids=document_ids)


def loss_of(model, streams):
    return model(**streams._asdict() | {"tokens": torch.stack(streams.tokens)}).sum()


def with_tiles(monkeypatch):
    """Do what a GPU does, on this CPU; returns the calls, as they come."""
    calls, flex = [], attention.flex_attention_forward
    monkeypatch.setattr(attention, "_TILED", ("cpu",))
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    monkeypatch.setattr(attention, "flex_attention_forward", lambda *a, **b: calls.append(1) or flex(*a, **b))
    return calls


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("recompute", [lambda model: None, recompute_cheap_operations])
def test_flex_attention_of_a_gpu_gives_the_same_loss_and_gradients(monkeypatch, gated, recompute):
    """Not compiled, since the compiled one has no backward on a CPU: torch says so, and is told not to."""
    context = "causal" if gated else "block"
    config = BlockDiffusionConfig(mask_token_id=63, block_size=8, context_attention=context)
    model = with_training_forward(tiny_model("llama"), context)
    if gated:
        options = replace(OPTIONS, lora_rank=4, gated_lora=True, context_attention="causal", dtype="float32")
        model = wrap_with_lora(model, 63, options, None)
        torch.nn.init.ones_(next(x for name, x in model.named_parameters() if "lora_B" in name))
    else:
        recompute(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    streams = streams_of(64, config)
    loss = loss_of(model, streams)
    gradients = torch.autograd.grad(loss, trained)
    calls = with_tiles(monkeypatch)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *inputs: None)
    with torch.compiler.set_stance("force_eager"):
        tiled = loss_of(model, streams)
        assert calls
        torch.testing.assert_close(tiled, loss)
        for one, other in zip(torch.autograd.grad(tiled, trained), gradients, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_compiled_flex_attention_gives_the_same_loss_at_every_length(monkeypatch):
    config = BlockDiffusionConfig(mask_token_id=63, block_size=8)
    model = with_training_forward(tiny_model("llama", head_dim=16), "block")
    with torch.no_grad():
        losses = [loss_of(model, streams_of(length, config)) for length in (32, 64, 96)]
        calls = with_tiles(monkeypatch)
        for length, loss in zip((32, 64, 96), losses, strict=True):
            torch.testing.assert_close(loss_of(model, streams_of(length, config)), loss)
        assert calls


def test_recomputing_runs_attention_once(monkeypatch):
    calls = []
    fused = attention._fused
    monkeypatch.setattr(attention, "_fused", lambda *inputs: calls.append(1) or fused(*inputs))
    model = with_training_forward(tiny_model("llama"), "block")
    recompute_cheap_operations(model)
    loss = loss_of(model, streams_of(32, BlockDiffusionConfig(mask_token_id=63, block_size=8)))
    forward = len(calls)
    loss.backward()
    assert len(calls) == forward > 0


def test_gradients_of_keys_that_many_pieces_see_are_summed_in_float32():
    """In bfloat16 a sum of 512 times 1/512 ends at 0.5, to which 1/512 adds nothing."""
    ones = torch.ones(1, 1, 512, 8, dtype=torch.bfloat16)
    key, value = (ones.clone().requires_grad_() for _ in range(2))
    positions = torch.arange(512)[None]
    pieces = attention.cut(sequence_tokens(positions, 512), "block", piece=1)
    attention.attend(ones, key, value, pieces).sum().backward()
    # Each of 512 queries gives each of 512 values 1/512.
    torch.testing.assert_close(value.grad, torch.ones_like(value.grad))
