"""Our CPU kernels against plain torch arithmetic, and a position's independence of its neighbours."""

import pytest
import torch
from torch.nn import functional as F

from decoding_cases import tokens
from fast_dllm.cache import KVCache, LayerShape
from fast_dllm.errors import FastDLLMError
from fast_dllm.model.backbone import ForwardBatch, RowSpan
from fast_dllm.model.cpu_ops import HEAD_DIMS, CpuOps
from fast_dllm.model.kernels import build, why_no_kernels
from fast_dllm.model.linear import Int8Linear
from fast_dllm.model.native import NativeBackbone
from fast_dllm.model.weights import LayerWeights, Shape
from tiny import tiny_model

MISSING = {kind: why_no_kernels(kind) for kind in ("int8", "bfloat16")}
both_kinds = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.skipif(why is not None, reason=str(why))) for kind, why in MISSING.items()],
)
INT8 = pytest.mark.skipif(MISSING["int8"] is not None, reason=str(MISSING["int8"]))


def shape(query_heads=4, kv_heads=2, head_dim=16):
    return Shape(1, query_heads, kv_heads, head_dim, 64, 1e-5, torch.float32)


def emulated(kind, inputs, weight):
    """The product as the kernel rounds it, in float64."""
    if kind == "bfloat16":
        return inputs.double() @ weight.bfloat16().double().T  # inputs stay in float32
    by_output, by_row = weight.abs().amax(1) / 127, inputs.abs().amax(1, keepdim=True) / 127
    return (inputs / by_row).round().double() @ (weight / by_output[:, None]).round().double().T * by_row * by_output


@both_kinds
@pytest.mark.parametrize("count", [1, 3, 8, 19])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (50, 70), (7, 1), (130, 200)])
def test_linear_is_the_product_of_the_rounded_operands(kind, count, inputs, outputs):
    torch.manual_seed(count)
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(count, inputs)
    ops = CpuOps(shape(), "block", int8=kind == "int8")
    hidden = torch.randn(count, outputs)
    expected = hidden + bias + emulated(kind, x, weight)
    ops.add_linear(ops.make_linear(weight, bias), x, hidden)
    torch.testing.assert_close(hidden, expected.float(), atol=2e-4, rtol=2e-4)


@both_kinds
def test_norm_and_gate_come_before_the_product(kind):
    torch.manual_seed(0)
    ops, norm = CpuOps(shape(), "block", int8=kind == "int8"), torch.rand(96) + 0.5
    weight, x, gate_up = torch.randn(48, 96), 5 * torch.randn(5, 96), 20 * torch.randn(5, 192)
    layer = ops.make_linear(weight, None)
    normed = F.rms_norm(x, (96,), norm, 1e-5)
    # Rounding may fall to the other side of a tie, hence the step of a rounded input as tolerance.
    torch.testing.assert_close(ops.linear(layer, x, norm), emulated(kind, normed, weight).float(), atol=0.2, rtol=0.02)
    gate, up = gate_up.chunk(2, dim=1)
    expected = emulated(kind, F.silu(gate) * up, weight).float()
    hidden = torch.zeros(5, 48)
    ops.add_linear(layer, gate_up, hidden, gated=True)
    torch.testing.assert_close(hidden, expected, atol=0.01 * expected.abs().max().item(), rtol=0.02)


@both_kinds
@pytest.mark.parametrize("width", HEAD_DIMS)
def test_attention_equals_that_of_torch(kind, width):
    torch.manual_seed(width)
    ops = CpuOps(shape(6, 2, width), "causal", int8=kind == "int8")
    cache = KVCache([LayerShape(2, width, width)], 3, 224, dtype=torch.bfloat16, device="cpu")
    for slab in (*cache.keys, *cache.values):
        slab.normal_()
    rows = [RowSpan(2, 70, 71, 71, 71, 8), RowSpan(0, 8, 28, 28, 28, 8), RowSpan(1, 190, 222, 224, 190, 32)]
    count = sum(row.length for row in rows)
    batch = ForwardBatch.build(rows, [0] * count, [])
    fused = torch.randn(count, 10 * width)
    plan = ops.plan(batch, cache, torch.ones(224, width // 2), torch.zeros(224, width // 2))
    layer = LayerWeights(*[None] * 8)
    queries = ops.store(fused.clone(), layer, 0, plan)
    attended = ops.attend(queries, 0, plan).view(count, 6, width)
    place = 0
    for row in rows:
        here = slice(place, place + row.length)
        place += row.length
        query, _, _ = fused[here].view(row.length, 10, width).split([6, 2, 2], dim=1)
        keys, values = (slab[0][row.slot, :, : row.visible_end].float() for slab in (cache.keys, cache.values))
        seen = torch.arange(row.visible_end) < torch.tensor(row.visible_ends("causal"))[:, None]
        expected = F.scaled_dot_product_attention(
            query.transpose(0, 1), keys.repeat_interleave(3, 0), values.repeat_interleave(3, 0), attn_mask=seen
        )
        torch.testing.assert_close(attended[here].transpose(0, 1), expected, atol=1e-5, rtol=1e-5)


@both_kinds
def test_keys_and_values_are_stored_where_they_belong(kind):
    ops = CpuOps(shape(), "block", int8=kind == "int8")
    cache = KVCache([LayerShape(2, 16, 16)], 2, 24, dtype=torch.bfloat16, device="cpu")
    batch = ForwardBatch.build([RowSpan(1, 5, 8, 8, 8, 8)], [0] * 3, [])
    plan = ops.plan(batch, cache, torch.ones(24, 8), torch.zeros(24, 8))
    fused = torch.randn(3, 8 * 16)
    ops.store(fused, LayerWeights(*[None] * 8), 0, plan)
    _, keys, values = fused.view(3, 8, 16).split([4, 2, 2], dim=1)
    assert torch.equal(cache.keys[0][1, :, 5:8], keys.transpose(0, 1).bfloat16())
    assert torch.equal(cache.values[0][1, :, 5:8], values.transpose(0, 1).bfloat16())
    assert cache.keys[0].count_nonzero() == cache.values[0].count_nonzero() == 2 * 3 * 16


@both_kinds
def test_logits_of_a_row_are_bitwise_those_it_has_alone(kind):
    precision = "int8" if kind == "int8" else "dense"
    model = tiny_model("qwen3", head_dim=16, dtype=torch.float32 if kind == "int8" else torch.bfloat16)
    native = NativeBackbone(model, "block", precision=precision, kernels="own")
    rows = [RowSpan(0, 0, 3, 8, 0, 8), RowSpan(2, 0, 8, 8, 0, 8), RowSpan(1, 0, 16, 16, 16, 8)]
    ids = [tokens(row.slot, row.length) for row in rows]
    together, alone = native.new_cache(3, 16), native.new_cache(3, 16)
    flat = [token for row in ids for token in row]
    logits = native.forward(ForwardBatch.build(rows, flat, range(len(flat))), together)
    own = [
        native.forward(ForwardBatch.build([row], i, range(row.length)), alone) for row, i in zip(rows, ids, strict=True)
    ]
    assert torch.equal(logits, torch.cat(own))


@both_kinds
def test_a_model_in_our_kernels_is_near_the_dense_one(kind):
    model = tiny_model("smollm2", head_dim=16)
    dense = NativeBackbone(model, "block")
    if kind == "bfloat16":
        model = tiny_model("smollm2", head_dim=16, dtype=torch.bfloat16)
    own = NativeBackbone(model, "block", precision="int8" if kind == "int8" else "dense", kernels="own")
    batch = ForwardBatch.build([RowSpan(0, 0, 24, 24, 24, 8)], tokens(3, 24), range(24))
    theirs, ours = (backbone.forward(batch, backbone.new_cache(1, 24)) for backbone in (dense, own))
    assert ((ours - theirs).norm() / theirs.norm()).item() < (0.1 if kind == "int8" else 0.04)


def test_int8_in_torch_is_the_product_of_the_rounded_operands():
    torch.manual_seed(0)
    weight, bias, x = torch.randn(40, 64), torch.randn(40), torch.randn(9, 64) * torch.logspace(-2, 3, 9)[:, None]
    layer = Int8Linear(weight, bias)
    expected = bias + emulated("int8", x, weight).float()
    torch.testing.assert_close(layer(x), expected, atol=1e-3, rtol=2e-2)
    assert torch.equal(layer(x)[3:4], layer(x[3:4]))


def test_without_a_compiler_torch_takes_over(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load_kernels.cache_clear()
    why_no_kernels.cache_clear()
    try:
        model = tiny_model("llama", head_dim=16)
        native = NativeBackbone(model, "block", precision="int8")
        assert native.kernels.startswith("torch (")
        with pytest.raises(FastDLLMError, match="our CPU kernels cannot run this model"):
            NativeBackbone(model, "block", precision="int8", kernels="own")
        assert list(tmp_path.iterdir()) == []
    finally:
        build.load_kernels.cache_clear()
        why_no_kernels.cache_clear()


@INT8
def test_a_failed_compilation_says_so_in_one_line_and_leaves_nothing(monkeypatch, tmp_path):
    broken = tmp_path / "kernels.cpp"
    broken.write_text("int broken(", encoding="utf-8")
    monkeypatch.setattr(build, "_SOURCE", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.load_kernels.cache_clear()
    try:
        with pytest.raises(OSError, match="could not compile the CPU kernels") as caught:
            build.load_kernels()
        assert "\n" not in str(caught.value)
        assert list((tmp_path / "cache" / "fast-dllm").iterdir()) == []
    finally:
        build.load_kernels.cache_clear()
