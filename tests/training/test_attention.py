"""Attention is what it is by definition, in pieces and by flex_attention; families that need more keep their own."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig

from fast_dllm.checkpoint import load_checkpoint
from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.masks import dense_mask, sequence_tokens
from fast_dllm.model.kernels import why_no_kernels
from fast_dllm.objective import lay_out
from fast_dllm.training import attention, attention_kernel, pieces
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


CONFIG = BlockDiffusionConfig(mask_token_id=63, block_size=8)


def dense(query, key, value, mask, scale):
    """By the definition of attention."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * (scale or query.shape[-1] ** -0.5)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value


WAYS = ("ours", "kernel", "torch", "torch, heads repeated", "narrow values", "strided queries")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_attention_in_pieces_is_attention(monkeypatch, dtype, tolerance, way, scale):
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 40, 8), (2, 48, 8), (2, 48, 4 if way == "narrow values" else 8)
    inputs = [torch.randn(2, *shape, generator=generator).to(dtype) for shape in shapes]
    if way == "strided queries":
        inputs[0] = inputs[0].transpose(2, 3).contiguous().transpose(2, 3)
    if way != "ours":
        monkeypatch.setattr(pieces, "_is_ours", lambda *inputs: False)
    if way.startswith("torch"):
        monkeypatch.setattr(pieces, "_has_kernel", lambda query, value: False)
    if way == "torch, heads repeated":
        monkeypatch.setattr(pieces, "_groups_heads", lambda device: False)
    tokens, keys = (sequence_tokens(torch.arange(n).expand(2, -1), 8) for n in (40, 48))
    inputs = [x.requires_grad_() for x in inputs]
    out = pieces.attend(*inputs, pieces.cut(tokens, "block", keys=keys, piece=16), scale)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = dense(*exact, dense_mask(tokens, "block", keys=keys), scale)
    found = (out, *torch.autograd.grad(out.square().sum(), inputs))
    for one, other in zip(found, (expected, *torch.autograd.grad(expected.square().sum(), exact)), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, atol=tolerance, rtol=tolerance)


def test_the_operator_is_what_torch_takes_for_one():
    query, key, value = (torch.randn(1, heads, 24, 8).requires_grad_() for heads in (4, 2, 2))
    cut = pieces.cut(sequence_tokens(torch.arange(24)[None], 8), "block", piece=16)
    of_pieces = [piece.columns for piece in cut], [piece.mask for piece in cut]
    torch.library.opcheck(pieces.attend_in_pieces, (query, key, value, *of_pieces, None))


@pytest.fixture(autouse=True)
def settings_that_are_put_back():
    names = ("optimize_ddp", "recompile_limit", "fail_on_recompile_limit_hit")
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in names}):
        yield


def streams_of(length, config):
    ids = torch.randint(4, 54, (2, length), generator=torch.Generator().manual_seed(length))
    views = torch.rand(2, 2, length, generator=torch.Generator().manual_seed(0)) < 0.5
    document_ids = (torch.arange(length) >= length // 2).long().expand(2, -1)
    return lay_out(ids, torch.ones_like(ids, dtype=torch.bool), views, config, document_ids=document_ids)


def loss_of(model, streams):
    return model(**streams._asdict() | {"tokens": torch.stack(streams.tokens)}).sum()


def with_tiles(monkeypatch):
    """Do what a GPU does, on this CPU; returns the calls, as they come."""
    calls, flex = [], attention._flex_attention
    monkeypatch.setattr(attention, "_TILED", ("cpu",))
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    monkeypatch.setattr(attention, "_flex_attention", lambda *a, **b: calls.append(1) or flex(*a, **b))
    return calls


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_flex_attention_of_a_gpu_gives_the_same_loss_and_gradients(monkeypatch, gated, bfloat16):
    """Not compiled, since the compiled one has no backward on a CPU: torch says so, and is told not to."""
    torch.manual_seed(0)
    context = "causal" if gated else "block"
    config = replace(CONFIG, context_attention=context)
    model = with_training_forward(tiny_model("llama", head_dim=16), context).train()
    if gated:
        options = replace(OPTIONS, lora_rank=4, gated_lora=True, context_attention="causal", dtype="float32")
        model = wrap_with_lora(model, 63, options, None)
        torch.nn.init.ones_(next(x for name, x in model.named_parameters() if "lora_B" in name))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    streams, arithmetic = streams_of(64, config), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)
    with arithmetic:
        loss = loss_of(model, streams)
    gradients = torch.autograd.grad(loss, trained)
    calls = with_tiles(monkeypatch)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *inputs: None)
    with torch.compiler.set_stance("force_eager"):
        with arithmetic:
            tiled = loss_of(model, streams)
        assert calls
        torch.testing.assert_close(tiled, loss, rtol=1e-2 if bfloat16 else 1e-6, atol=0)
        for one, other in zip(torch.autograd.grad(tiled, trained), gradients, strict=True):
            error = (one - other).norm() / other.norm().clamp(min=1e-3)
            assert error < (0.2 if bfloat16 else 1e-4)


def test_flex_attention_is_compiled_under_ddp_where_layers_are_recomputed(monkeypatch):
    """As far as a CPU goes: traced with its backward, and run as it was traced."""
    model = with_training_forward(tiny_model("llama", head_dim=16), "block").train()
    recompute_cheap_operations(model)
    loss = loss_of(model, streams_of(64, CONFIG))
    monkeypatch.setattr(attention, "_flex_attention", torch.compile(flex_attention.flex_attention, backend="aot_eager"))
    calls = with_tiles(monkeypatch)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *inputs: None)
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", SimpleNamespace(bucket_bytes_cap=1 << 25))
    tiled = loss_of(model, streams_of(64, CONFIG))
    assert calls
    torch.testing.assert_close(tiled, loss)
    tiled.backward()


def test_compiled_flex_attention_is_compiled_twice_for_all_lengths(monkeypatch):
    model = with_training_forward(tiny_model("llama", head_dim=16), "block")
    lengths = (64, 96, 128, 160)
    with torch.no_grad():
        losses = [loss_of(model, streams_of(length, CONFIG)) for length in lengths]
        calls, compiled = with_tiles(monkeypatch), counters["stats"]["unique_graphs"]
        for length, loss in zip(lengths, losses, strict=True):
            torch.testing.assert_close(loss_of(model, streams_of(length, CONFIG)), loss)
    assert calls
    assert counters["stats"]["unique_graphs"] - compiled in (1, 2)  # 1, if it was compiled here before


def test_flex_attention_is_for_devices_and_heads_that_have_it(monkeypatch):
    tokens = sequence_tokens(torch.arange(32)[None], 8)
    wide, narrow = (tiny_model("llama", head_dim=width).config for width in (16, 8))
    composite = AutoConfig.for_model("gemma3")
    assert isinstance(attention.training_mask(tokens, "block", wide), list)
    with_tiles(monkeypatch)
    for config in (wide, composite):
        assert isinstance(attention.training_mask(tokens, "block", config), flex_attention.BlockMask)
    assert isinstance(attention.training_mask(tokens, "block", narrow), list)


def test_our_kernel_is_for_float32_on_a_cpu():
    of = {name: torch.zeros(1, 2, 8, 8, dtype=getattr(torch, name)) for name in ("float32", "bfloat16", "float64")}
    ours = {name for name, x in of.items() if pieces._is_ours(x, x, x)}
    assert ours == ({"float32"} if why_no_kernels() is None else set())
    assert not pieces._is_ours(of["float32"].transpose(2, 3), of["float32"], of["float32"])
    assert not pieces._is_ours(*[of["float32"].to("meta")] * 3)


@pytest.mark.parametrize(("owner", "name"), [(attention_kernel, "attend"), (pieces, "_fused")])
def test_recomputing_runs_attention_once(monkeypatch, owner, name):
    calls = []
    own = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *inputs: calls.append(1) or own(*inputs))
    if owner is pieces:
        monkeypatch.setattr(pieces, "_is_ours", lambda *inputs: False)
    elif why_no_kernels() is not None:
        pytest.skip(str(why_no_kernels()))
    model = with_training_forward(tiny_model("llama"), "block").train()
    recompute_cheap_operations(model)
    loss = loss_of(model, streams_of(32, CONFIG))
    forward = len(calls)
    loss.backward()
    assert len(calls) == forward > 0


def test_gradients_of_keys_that_many_pieces_see_are_summed_in_float32():
    """In bfloat16 a sum of 512 times 1/512 ends at 0.5, to which 1/512 adds nothing."""
    ones = torch.ones(1, 1, 512, 8, dtype=torch.bfloat16)
    key, value = (ones.clone().requires_grad_() for _ in range(2))
    positions = torch.arange(512)[None]
    of_one = pieces.cut(sequence_tokens(positions, 512), "block", piece=1)
    pieces.attend(ones, key, value, of_one).sum().backward()
    # Each of 512 queries gives each of 512 values 1/512.
    torch.testing.assert_close(value.grad, torch.ones_like(value.grad))
