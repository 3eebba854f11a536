"""The native backbone gives what transformers' modules give, for every family it knows."""

import json

import pytest
import torch
from hypothesis import given, settings

from decoding_cases import FORWARDS, STEPS, backbone, bytes_allocated, cases, confident_model, tokens
from fast_dllm.api import BlockDiffusionLM, make_backbone
from fast_dllm.checkpoint.checkpoint import Checkpoint
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.errors import FastDLLMError
from fast_dllm.generation import generate_batch
from fast_dllm.model.backbone import ForwardBatch, RowSpan
from fast_dllm.model.hf import HFBackbone
from fast_dllm.model.native import NativeBackbone
from fast_dllm.model.weights import unknown_to_native
from tiny import ARCHITECTURES, tiny_model


def logits_of(models):
    """Logits of each model over `FORWARDS`, every position read."""
    caches = [model.new_cache(3, 48) for model in models]
    for number, rows in enumerate(FORWARDS):
        ids = tokens(number, sum(row.length for row in rows))
        batch = ForwardBatch.build(rows, ids, range(len(ids)))
        yield [model.forward(batch, cache) for model, cache in zip(models, caches, strict=True)]


@pytest.mark.parametrize("attention", ["block", "causal", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_those_of_transformers(architecture, attention):
    model = tiny_model(architecture)
    for ours, theirs in logits_of([NativeBackbone(model, attention), HFBackbone(model, attention)]):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_variants_equal_those_of_transformers(rope):
    parameters = {**rope, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    model = tiny_model("llama", rope_parameters=parameters)
    for ours, theirs in logits_of([NativeBackbone(model, "block"), HFBackbone(model, "block")]):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_only_wanted_logits_are_computed_and_they_are_the_same():
    model = NativeBackbone(tiny_model("llama"), "block")
    whole, part = model.new_cache(1, 32), model.new_cache(1, 32)
    ids, rows = tokens(1, 16), [RowSpan(0, 0, 16, 16, 16, 8)]
    everything = model.forward(ForwardBatch.build(rows, ids, range(16)), whole)
    torch.testing.assert_close(model.forward(ForwardBatch.build(rows, ids, [3, 15]), part), everything[[3, 15]])
    assert model.forward(ForwardBatch.build(rows, ids, []), part).shape == (0, 64)
    for layer in range(2):
        torch.testing.assert_close(part.keys[layer], whole.keys[layer])


@settings(max_examples=200)
@given(cases())
def test_tokens_equal_those_of_the_cache_free_reference(case):
    assert case.decode(kind=NativeBackbone).answers[0] == case.reference()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_ragged_batch_gives_what_each_row_gives_alone(architecture):
    model = backbone(architecture, kind=NativeBackbone)
    config = BlockDiffusionConfig(mask_token_id=63, block_size=8)
    prompts = [tokens(seed, length) for seed, length in enumerate([3, 30, 8, 17, 1, 64])]
    decoding = [DecodingConfig(max_new_tokens=20 + i, small_block_size=4, threshold=0.3) for i in range(6)]
    together = generate_batch(model, config, prompts, decoding, (5, 9), max_batch=4)
    alone = [
        generate_batch(model, config, [prompt], [own], (5, 9)).answers[0]
        for prompt, own in zip(prompts, decoding, strict=True)
    ]
    assert together.answers == alone


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("precision", ["dense", "int8"])
def test_a_step_allocates_nothing_that_grows_with_the_context(precision, step):
    model = NativeBackbone(tiny_model("llama", head_dim=16), "block", precision=precision)
    # torch's attention has work space for a tile of 512 keys.
    assert 0 < bytes_allocated(model, step, 2048) <= bytes_allocated(model, step, 512)


def checkpoint_of(model):
    config = BlockDiffusionConfig(mask_token_id=63, block_size=8)
    return Checkpoint(model=model, tokenizer=None, config=config, stop_token_ids=(), origin="tiny")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_takes_native_where_it_knows_the_model(architecture):
    assert isinstance(make_backbone(checkpoint_of(tiny_model(architecture))), NativeBackbone)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"model_type": "phi3"}, "model type 'phi3'"),
        ({"hidden_act": "gelu"}, "its MLP uses 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "RoPE variant 'dynamic'"),
    ],
)
def test_auto_takes_transformers_modules_where_it_does_not_and_says_why(overrides, why):
    checkpoint = checkpoint_of(tiny_model("llama", **overrides))
    assert why in unknown_to_native(checkpoint.model)
    assert isinstance(make_backbone(checkpoint), HFBackbone)
    with pytest.raises(FastDLLMError, match=why):
        make_backbone(checkpoint, "native")


def test_partly_turned_heads_are_refused():
    # transformers' own modules of these families cannot run them either.
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert "a part of each head" in unknown_to_native(tiny_model("llama", rope_parameters=rope))


def test_quantised_weights_go_through_transformers_modules():
    class Packed(torch.nn.Linear):
        """What bitsandbytes and BitNet put in a linear layer's place: a subclass, its weight bytes."""

    model = tiny_model("llama")
    down = model.model.layers[1].mlp.down_proj
    down.__class__ = Packed
    assert unknown_to_native(model) == "its weights are quantised (Packed)"
    down.__class__ = torch.nn.Linear
    down.weight = torch.nn.Parameter(down.weight.to(torch.uint8), requires_grad=False)
    assert unknown_to_native(model) == "its weights are quantised (Linear)"


def test_code_that_a_checkpoint_brings_is_what_runs(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnLlama"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\n"
        "class OwnLlama(LlamaForCausalLM):\n"
        "    def __init__(self, config):\n"
        "        super().__init__(config)\n"
        "        for layer in self.model.layers:\n"
        "            layer.self_attn.scaling = 0.02\n"
    )
    assert isinstance(BlockDiffusionLM.from_pretrained(tmp_path).backbone, NativeBackbone)
    own = BlockDiffusionLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert isinstance(own.backbone, HFBackbone)
    assert unknown_to_native(own.checkpoint.model) == "it brings code of its own (OwnLlama)"


def test_int8_and_transformers_modules_do_not_go_together():
    with pytest.raises(FastDLLMError, match="int8"):
        make_backbone(checkpoint_of(tiny_model("llama")), "hf", int8=True)


def test_dense_weights_are_in_memory_once():
    model = confident_model("qwen2")  # float64 is never packed
    before = model(torch.tensor([[1, 2, 3]])).logits
    native = NativeBackbone(model, "block")
    fused = native._weights.layers[0].qkv.weight
    assert model.model.layers[0].self_attn.k_proj.weight.untyped_storage().data_ptr() == fused.data_ptr()
    torch.testing.assert_close(model(torch.tensor([[1, 2, 3]])).logits, before)
