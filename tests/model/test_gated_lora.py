"""A gated adapter in the native backbone: what transformers' modules give, and nothing where no mask token is."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from decoding_cases import FORWARDS, MASK, needs_compiler, tokens
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.gated_lora import LowRank, gate_adapter
from fast_dllm.generation import generate_batch
from fast_dllm.model.backbone import ForwardBatch
from fast_dllm.model.hf import HFBackbone
from fast_dllm.model.kernels import load_kernels
from fast_dllm.model.native import NativeBackbone
from fast_dllm.model.weights import LayerWeights
from kernel_layers import ROWS, Layer, angles, assert_near, both_caches, both_kinds, emulated
from packed_cache import random_cache
from tiny import tiny_model


def adapted(model, targets="all-linear"):
    """The model, a random gated adapter on it."""
    torch.manual_seed(1)
    # A rank that no kernel takes as it is.
    lora = LoraConfig(target_modules=targets, r=6, lora_alpha=9, init_lora_weights=False)
    model = get_peft_model(model, lora).get_base_model().eval()
    gate_adapter(model, MASK)
    return model


def logits_of(backbone, masks=True):
    """Logits over `FORWARDS`, of every position but the first; every third token is a mask, or none is."""
    cache = backbone.new_cache(3, 48)
    for number, rows in enumerate(FORWARDS):
        ids = tokens(number, sum(row.length for row in rows))
        if masks:
            ids[1::3] = [MASK] * len(ids[1::3])
        yield backbone.forward(ForwardBatch.build(rows, ids, range(1, len(ids))), cache)


def distance(ours, theirs):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "down_proj"], ["up_proj"]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # packed, and sharing the model's weights
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_logits_equal_those_of_transformers(architecture, dtype, targets):
    model = adapted(tiny_model(architecture, dtype=dtype), targets)
    before = list(logits_of(HFBackbone(model, "block")))
    native = NativeBackbone(model, "block")
    for theirs in (before, logits_of(HFBackbone(model, "block"))):
        for ours, expected in zip(logits_of(native), theirs, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_without_masks_nothing_is_added_and_with_masks_something_is():
    plain, ours = (NativeBackbone(make(tiny_model("llama")), "causal") for make in (lambda model: model, adapted))
    assert all(map(torch.equal, logits_of(ours, masks=False), logits_of(plain, masks=False)))
    assert distance(logits_of(ours), logits_of(plain)) > 0.2


@needs_compiler
def test_compiled_logits_equal_those_of_the_eager_steps():
    model = adapted(tiny_model("llama"))
    compiled = NativeBackbone(model, "block", compile=True)
    for masks in (False, True):  # the same bucket
        eager = logits_of(NativeBackbone(model, "block"), masks)
        for ours, theirs in zip(logits_of(compiled, masks), eager, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


class AdaptedLayer(Layer):
    """A layer of which an adapter adds to the positions of the last of `ROWS`, but for the first."""

    masked = torch.arange(53) > 21

    def __init__(self, kind, width=16, **settings):
        super().__init__(kind, width, **settings)
        sizes = {name: weight.shape for name, weight in self.weights.items()}
        self.low_ranks = {name: LowRank(torch.randn(6, i) / 6, torch.randn(o, 6) / 3) for name, (o, i) in sizes.items()}

    def run(self, hidden, batch, cache, cos, sin, masked=None):
        make = self.ops.make_linear
        linears = {name: make(weight, None, self.low_ranks[name]) for name, weight in self.weights.items()}
        masked = self.masked if masked is None else masked
        plan = self.ops.plan(batch, cache, cos, sin, masked if masked.any() else None)
        return self.ops.layers([LayerWeights(**linears, **self.named_norms())], hidden.clone(), plan)

    def project(self, name, x):
        down, up = self.low_ranks[name]
        added = emulated("bfloat16", emulated("bfloat16", x, down), up).float()
        return super().project(name, x) + self.masked[: len(x), None] * added


@both_kinds
@both_caches
@pytest.mark.parametrize("inner", [56, 57])  # units of inputs that are filled, and partly
def test_own_kernels_add_the_product_of_the_rounded_operands(kind, int8_cache, inner):
    torch.manual_seed(0)
    layer, (cos, sin), cache = AdaptedLayer(kind, inner=inner), angles(16), random_cache(16, int8=int8_cache)
    batch, hidden = ForwardBatch.build(ROWS, [0] * 53, range(53)), torch.randn(53, 40)
    ours = layer.run(hidden, batch, cache, cos, sin)
    theirs = layer.expected(hidden, batch, cache, cos, sin)[0]
    assert_near(ours[:21], theirs[:21], kind, int8_cache=int8_cache)
    if kind == "bfloat16":
        assert_near(ours, theirs, kind, int8_cache=int8_cache)
    # Steps are coarser where two neighbours share a range.
    assert (ours - theirs).norm() / theirs.norm() < (0.03 if load_kernels().fast_dllm_byte_products() else 0.04)
    assert (Layer.run(layer, hidden, batch, cache, cos, sin) - theirs).norm() / theirs.norm() > 0.2


@both_kinds
@both_caches
def test_a_position_is_bitwise_what_it_is_alone_and_a_clean_row_what_it_is_without_the_adapter(kind, int8_cache):
    torch.manual_seed(0)
    layer, (cos, sin), hidden = AdaptedLayer(kind), angles(16), torch.randn(53, 40)
    before, cache = torch.get_num_threads(), random_cache(16, int8=int8_cache)
    try:
        torch.set_num_threads(2)
        together = layer.run(hidden, ForwardBatch.build(ROWS, [0] * 53, range(53)), cache, cos, sin)
        torch.set_num_threads(1)
        for row, first in zip(ROWS, (0, 1, 21), strict=True):
            some = slice(first, first + row.length)
            batch = ForwardBatch.build([row], [0] * row.length, range(0, row.length, 3))
            alone = layer.run(hidden[some], batch, cache, cos, sin, layer.masked[some])
            assert torch.equal(alone, together[some][::3])
            if row != ROWS[2]:
                assert torch.equal(Layer.run(layer, hidden[some], batch, cache, cos, sin), alone)
    finally:
        torch.set_num_threads(before)


def low_precision(kind, architecture, prepare=lambda model: model, kernels="own"):
    model = tiny_model(architecture, head_dim=16, dtype=torch.float32 if kind == "int8" else torch.bfloat16)
    precision = "int8" if kind == "int8" else "dense"
    native = NativeBackbone(prepare(model), "causal", precision=precision, kernels=kernels)
    native.draft_budget = 16  # on some CPUs it is too small for rows in a batch to draft
    return native


@both_kinds
@pytest.mark.parametrize("kernels", ["own", "torch"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_model_in_low_precision_is_near_the_dense_one(kind, kernels, architecture):
    dense = NativeBackbone(adapted(tiny_model(architecture, head_dim=16)), "causal")
    ours = low_precision(kind, architecture, adapted, kernels)
    assert distance(logits_of(ours), logits_of(dense)) < (0.1 if kind == "int8" else 0.04)


@both_kinds
def test_verified_answers_are_the_autoregressive_ones_without_the_adapter_and_drafts_are_its_own(kind):
    plain, ours = low_precision(kind, "llama"), low_precision(kind, "llama", adapted)
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=8, context_attention="causal")
    prompts = [tokens(seed, length) for seed, length in enumerate([3, 30, 8, 17, 1, 64])]

    def decode(native, **decoding):
        settings = DecodingConfig(max_new_tokens=40, **decoding)
        return generate_batch(native, config, prompts, settings, (), max_batch=4)

    drafted = decode(ours, threshold=0.03)
    assert drafted.answers == decode(plain, block_size=1).answers == decode(ours, block_size=1).answers
    assert drafted.reveal_steps != decode(plain, threshold=0.03).reveal_steps
