"""Our CPU kernels against plain torch arithmetic, and a position's independence of its neighbours."""

import errno
import mmap

import pytest
import torch
from torch.nn import functional as F

from decoding_cases import STEPS, bytes_allocated, tokens
from fast_dllm.cache import LayerShape
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.errors import FastDLLMError
from fast_dllm.generation import generate_batch
from fast_dllm.model.backbone import ForwardBatch, RowSpan
from fast_dllm.model.cpu_cache import CpuCache
from fast_dllm.model.cpu_ops import HEAD_DIMS, CpuOps, kernel_seconds
from fast_dllm.model.kernels import build, memory, why_no_kernels
from fast_dllm.model.linear import Int8Linear
from fast_dllm.model.native import NativeBackbone
from kernel_layers import (
    HAS_KERNELS,
    ROWS,
    Layer,
    angles,
    assert_near,
    both_caches,
    both_kinds,
    emulated,
    rotated,
    shape,
    steps_of,
)
from packed_cache import random_cache, turned, unpacked
from tiny import tiny_model


@both_kinds
@pytest.mark.parametrize("count", [1, 3, 8, 14, 15, 16, 35])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (50, 70), (7, 1), (130, 200)])
def test_linear_is_the_product_of_the_rounded_operands(kind, count, inputs, outputs):
    torch.manual_seed(count)
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(count, inputs)
    ops = CpuOps(shape(), "block", int8=kind == "int8")
    expected = bias + emulated(kind, x, weight)
    torch.testing.assert_close(
        ops.linear(ops.make_linear(weight, bias), x, None), expected.float(), atol=2e-4, rtol=2e-4
    )


@both_kinds
def test_the_largest_products_do_not_overflow(kind):
    # Of all weights and inputs at the ends of their ranges, some CPUs could not sum two products.
    weight = torch.ones(40, 64) * torch.tensor([1.0, -1.0]).repeat(20)[:, None]
    x = torch.cat([torch.ones(3, 64), -torch.ones(3, 64)])
    ops = CpuOps(shape(), "block", int8=kind == "int8")
    assert_close = torch.testing.assert_close
    assert_close(
        ops.linear(ops.make_linear(weight, None), x, None), emulated(kind, x, weight).float(), atol=0, rtol=1e-5
    )
    assert_close(ops.linear(ops.make_linear(weight, None), x, None), x @ weight.T, atol=0, rtol=0.01)


@both_kinds
def test_the_norm_comes_before_the_product(kind):
    torch.manual_seed(0)
    ops, norm = CpuOps(shape(), "block", int8=kind == "int8"), torch.rand(96) + 0.5
    weight, x = torch.randn(48, 96), 5 * torch.randn(5, 96)
    normed = F.rms_norm(x, (96,), norm, 1e-5)
    # Rounding may fall to the other side of a tie, hence the step of a rounded input as tolerance.
    expected = emulated(kind, normed, weight).float()
    torch.testing.assert_close(ops.linear(ops.make_linear(weight, None), x, norm), expected, atol=0.2, rtol=0.02)


@both_kinds
@both_caches
@pytest.mark.parametrize("extras", [{}, {"bias": True}, {"qk_norm": True}], ids=["plain", "bias", "qk norm"])
@pytest.mark.parametrize("width", HEAD_DIMS)
def test_a_layer_equals_plain_arithmetic(kind, int8_cache, width, extras):
    torch.manual_seed(width)
    layer, (cos, sin), cache = Layer(kind, width, **extras), angles(width), random_cache(width, int8=int8_cache)
    batch = ForwardBatch.build(ROWS, [0] * 53, range(53))
    hidden = torch.randn(53, 40)
    ours = layer.run(hidden, batch, cache, cos, sin)
    assert_near(ours, layer.expected(hidden, batch, cache, cos, sin)[0], kind, int8_cache=int8_cache)


@both_kinds
@both_caches
@pytest.mark.parametrize("width", HEAD_DIMS)
def test_attention_equals_that_of_torch(kind, int8_cache, width):
    torch.manual_seed(width)
    heads = 6 * width
    layer, (cos, sin), cache = Layer(kind, width, hidden=heads), angles(width), random_cache(width, int8=int8_cache)
    layer.weights["out"], layer.weights["down"] = torch.eye(heads), torch.zeros(heads, 56)
    hidden = torch.randn(53, heads)
    batch = ForwardBatch.build(ROWS, [0] * 53, range(53))
    ours = layer.run(hidden, batch, cache, cos, sin) - hidden
    qkv = layer.ops.make_linear(layer.weights["qkv"], None)
    fused = layer.ops.linear(qkv, hidden, layer.norms[0]).view(53, 10, width)
    queries = rotated(fused[:, :6], cos[batch.positions], sin[batch.positions])
    expected = layer.attended(queries, batch, cache)
    if int8_cache:  # the weights of the values are rounded to 255 steps
        assert_near(ours, expected, kind, int8_cache=True)
        return
    # In int8 the output projection rounds what it gets to steps, whatever its weights.
    step = steps_of(expected) if kind == "int8" else torch.zeros(53, 1)
    assert ((ours - expected).abs() <= 0.51 * step + 1e-5).all()


@both_kinds
@both_caches
@pytest.mark.parametrize("qk_norm", [False, True])
def test_keys_and_values_are_stored_where_they_belong(kind, int8_cache, qk_norm):
    torch.manual_seed(0)
    layer, (cos, sin) = Layer(kind, 16, qk_norm=qk_norm), angles(16)
    cache = CpuCache(1, LayerShape(2, 16, 16), 2, 24, int8=int8_cache)
    batch, hidden = ForwardBatch.build([RowSpan(1, 5, 8, 8, 8, 8)], [0] * 3, []), torch.randn(3, 40)
    assert layer.run(hidden, batch, cache, cos, sin).shape == (0, 40)
    _, keys, values = layer.expected(hidden, batch, cache, cos, sin)
    step = max(keys.abs().max(), values.abs().max()).item() / 127
    tolerance = {"atol": (0.05 if kind == "int8" else 1e-3) + int8_cache * 2 * step, "rtol": 0.01}
    stored = dict(zip(("keys", "values"), unpacked(cache), strict=True))
    expected = {"keys": turned(keys, int8=int8_cache), "values": values}
    for name, slab in stored.items():
        torch.testing.assert_close(slab[1, :, 5:8], expected[name].transpose(0, 1), **tolerance)
        slab[1, :, 5:8] = 0
        assert not slab.any()


@both_kinds
@both_caches
@pytest.mark.parametrize("threads", [1, 2])
def test_a_position_is_bitwise_what_it_is_alone(kind, int8_cache, threads):
    torch.manual_seed(0)
    layer, (cos, sin), hidden = Layer(kind, 64, query_heads=9, kv_heads=3), angles(64), torch.randn(53, 40)
    before = torch.get_num_threads()
    torch.manual_seed(1)
    cache = random_cache(64, int8=int8_cache, kv_heads=3)
    try:
        torch.set_num_threads(3 - threads)
        together = layer.run(hidden, ForwardBatch.build(ROWS, [0] * 53, range(53)), cache, cos, sin)
        torch.set_num_threads(threads)
        # Their K/V is there already, and writing it again changes nothing.
        for row, first in zip(ROWS, (0, 1, 21), strict=True):
            for read in ([*range(row.length)], [*range(0, row.length, 3)], [row.length - 1]):
                batch = ForwardBatch.build([row], [0] * row.length, read)
                alone = layer.run(hidden[first : first + row.length], batch, cache, cos, sin)
                assert torch.equal(alone, together[[first + place for place in read]])
    finally:
        torch.set_num_threads(before)


@both_kinds
@both_caches
def test_long_contexts_are_done_in_parts_that_change_nothing(kind, int8_cache):
    # 640 positions over 4,096 keys are more partial results than are held at once.
    torch.manual_seed(0)
    layer = Layer(kind, 64, query_heads=9, kv_heads=3)
    cache = random_cache(64, int8=int8_cache, kv_heads=3, slots=1, length=4096)
    cos, sin = torch.ones(4096, 32), torch.zeros(4096, 32)
    hidden = torch.randn(640, 40)
    row = RowSpan(0, 3456, 4096, 4096, 3456, 640)
    whole = layer.run(hidden, ForwardBatch.build([row], [0] * 640, range(640)), cache, cos, sin)
    some = ForwardBatch.build([row], [0] * 640, [0, 1, 100, 639])
    assert_near(whole[some.read], layer.expected(hidden, some, cache, cos, sin)[0], kind, int8_cache=int8_cache)
    assert torch.equal(layer.run(hidden, some, cache, cos, sin), whole[some.read])


def own_backbone(kind, architecture, attention="block", *, int8_cache=False):
    model = tiny_model(architecture, head_dim=16, dtype=torch.float32 if kind == "int8" else torch.bfloat16)
    precision, cache_dtype = "int8" if kind == "int8" else "dense", "int8" if int8_cache else "bfloat16"
    native = NativeBackbone(model, attention, precision=precision, kernels="own", cache_dtype=cache_dtype)
    native.draft_budget = 16  # on some CPUs it is too small for rows in a batch to draft
    return native


@both_kinds
@both_caches
def test_logits_of_a_row_are_bitwise_those_it_has_alone(kind, int8_cache):
    native = own_backbone(kind, "qwen3", int8_cache=int8_cache)
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
@both_caches
def test_a_model_in_our_kernels_is_near_the_dense_one(kind, int8_cache):
    dense = NativeBackbone(tiny_model("smollm2", head_dim=16), "block")
    own = own_backbone(kind, "smollm2", int8_cache=int8_cache)
    batch = ForwardBatch.build([RowSpan(0, 0, 24, 24, 24, 8)], tokens(3, 24), range(24))
    theirs, ours = (backbone.forward(batch, backbone.new_cache(1, 24)) for backbone in (dense, own))
    assert ((ours - theirs).norm() / theirs.norm()).item() < (0.1 if kind == "int8" else 0.04)


@both_kinds
@both_caches
def test_what_was_copied_from_another_slot_is_read_as_if_computed_there(kind, int8_cache):
    native = own_backbone(kind, "llama", "causal", int8_cache=int8_cache)
    cache, ids = native.new_cache(3, 64), tokens(5, 45)

    def run(slot, start, end):
        return native.forward(
            ForwardBatch.build([RowSpan(slot, start, end, end, end, 8)], ids[start:end], range(end - start)), cache
        )

    run(2, 0, 40)  # ends within a block of the cache
    cache.copy(2, 0, 37)
    assert torch.equal(run(0, 37, 45), run(2, 37, 45))


@both_kinds
@both_caches
def test_a_batch_gives_what_each_row_gives_alone_and_what_autoregressive_decoding_gives(kind, int8_cache):
    native = own_backbone(kind, "llama", "causal", int8_cache=int8_cache)
    config = BlockDiffusionConfig(mask_token_id=63, block_size=8, context_attention="causal")
    prompts = [tokens(seed, length) for seed, length in enumerate([3, 30, 8, 17, 1, 64])]

    def answers(some, max_batch, **decoding):
        return generate_batch(
            native, config, some, DecodingConfig(max_new_tokens=40, **decoding), (), max_batch=max_batch
        ).answers

    together = answers(prompts, 4, threshold=0.03)
    assert together == [answers([prompt], 1, threshold=0.03)[0] for prompt in prompts]
    assert together == answers(prompts, 3, block_size=1)


@HAS_KERNELS
def test_an_int8_cache_takes_half_the_memory():
    bfloat16, int8 = (own_backbone("int8", "llama", int8_cache=int8).new_cache(2, 64) for int8 in (False, True))
    # Two layers of two heads, a key and a value each, 16 elements wide; a scale of two bytes for each.
    assert (bfloat16.bytes_per_token, int8.bytes_per_token) == (2 * 2 * 2 * 32, 2 * 2 * 2 * 18)


@HAS_KERNELS
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("int8_cache", [False, True])
def test_a_step_allocates_nothing_that_grows_with_the_context(int8_cache, step):
    native = own_backbone("int8", "llama", int8_cache=int8_cache)
    assert 0 < bytes_allocated(native, step, 2048) <= bytes_allocated(native, step, 512)


@both_kinds
def test_keys_and_values_are_int8_where_the_weights_are(kind):
    model = tiny_model("llama", head_dim=16, dtype=torch.float32 if kind == "int8" else torch.bfloat16)
    native = NativeBackbone(model, "causal", precision="int8" if kind == "int8" else "dense")
    assert native.cache_dtype == kind


@pytest.mark.parametrize(
    ("model", "cache_dtype", "why"),
    [
        ({"dtype": torch.float32}, "int8", "not float32"),
        ({"dtype": torch.bfloat16}, "int4", "'bfloat16' or 'int8'"),
    ],
)
def test_a_cache_that_cannot_be_had_is_an_error(model, cache_dtype, why):
    with pytest.raises(FastDLLMError, match=why):
        NativeBackbone(tiny_model("llama", head_dim=16, **model), "block", cache_dtype=cache_dtype)


@HAS_KERNELS
def test_kernels_say_where_their_time_goes_while_somebody_asks():
    native = NativeBackbone(tiny_model("llama", head_dim=16), "block", precision="int8", kernels="own")
    batch, cache = ForwardBatch.build([RowSpan(0, 0, 24, 24, 24, 8)], tokens(3, 24), range(24)), native.new_cache(1, 24)
    with kernel_seconds() as spent:
        native.forward(batch, cache)
    assert all(seconds > 0 for seconds in spent.values())
    before = dict(spent)
    native.forward(batch, cache)
    assert spent == before


def test_int8_in_torch_is_the_product_of_the_rounded_operands():
    torch.manual_seed(0)
    weight, bias, x = torch.randn(40, 64), torch.randn(40), torch.randn(9, 64) * torch.logspace(-2, 3, 9)[:, None]
    layer = Int8Linear(weight, bias)
    levels = 127 if torch.cpu._is_vnni_supported() else 63
    expected = bias + emulated("int8", x, weight, x.abs().amax(1, keepdim=True) / levels).float()
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


@HAS_KERNELS
def test_without_a_home_directory_torch_takes_over(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(build.Path, "home", homeless)
    build.load_kernels.cache_clear()
    why_no_kernels.cache_clear()
    try:
        assert "set XDG_CACHE_HOME" in why_no_kernels()
    finally:
        build.load_kernels.cache_clear()
        why_no_kernels.cache_clear()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no Linux")
def test_weights_lie_in_normal_pages_where_the_kernel_has_no_huge_ones(monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, *_):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(memory.mmap, "mmap", Refusing)
    assert torch.equal(memory.huge_pages(100), torch.zeros(100, dtype=torch.uint8))


@HAS_KERNELS
def test_a_failed_compilation_says_so_in_one_line_and_leaves_nothing(monkeypatch, tmp_path):
    (tmp_path / "kernels.cpp").write_text("int broken(", encoding="utf-8")
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.load_kernels.cache_clear()
    try:
        with pytest.raises(OSError, match="could not compile the CPU kernels") as caught:
            build.load_kernels()
        assert "\n" not in str(caught.value)
        assert list((tmp_path / "cache" / "fast-dllm").iterdir()) == []
    finally:
        build.load_kernels.cache_clear()
