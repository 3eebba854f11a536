"""The compiled backbone gives the eager one's logits and tokens, in a bounded number of compilations."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from decoding_cases import STEPS, bytes_allocated, confident_model, needs_compiler, tokens
from fast_dllm.api import BlockDiffusionLM, make_backbone
from fast_dllm.checkpoint.checkpoint import Checkpoint
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.errors import FastDLLMError
from fast_dllm.generation import generate_batch
from fast_dllm.model.backbone import ForwardBatch, RowSpan
from fast_dllm.model.compiled import _kernel_options, bucket_size
from fast_dllm.model.native import NativeBackbone
from tiny import save_tiny, tiny_model

STOPS = (5, 9)

# Rows (slot, start, end, visible_end, noisy_from, block size). Two tiles of positions, the first of which sees three
# rows; then a sub-block, a commit and a block over what those left in the slots.
FORWARDS = [
    [RowSpan(2, 0, 8, 8, 8, 8), RowSpan(0, 0, 24, 24, 24, 8), RowSpan(1, 0, 136, 136, 136, 8)],
    [RowSpan(2, 10, 13, 16, 8, 8), RowSpan(1, 136, 144, 144, 144, 8), RowSpan(0, 24, 40, 40, 32, 8)],
]


@cache
def backbones(architecture, attention="block"):
    model = confident_model(architecture, torch.float32)
    return NativeBackbone(model, attention, kernels="torch"), NativeBackbone(model, attention, compile=True)


def compilations():
    return counters["stats"]["unique_graphs"]


def test_a_bucket_has_room_and_wastes_less_than_a_third():
    for positions in range(1, 2000):
        size = bucket_size(positions)
        assert positions <= size < 1.5 * positions
        assert bucket_size(size) == size


@needs_compiler
@pytest.mark.parametrize("attention", ["block", "causal", "full"])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])  # QKV bias, QK norm
def test_logits_equal_those_of_the_eager_steps(architecture, attention):
    eager, compiled = backbones(architecture, attention)
    caches = [model.new_cache(3, 150) for model in (eager, compiled)]
    for number, rows in enumerate(FORWARDS):
        ids = tokens(number, sum(row.length for row in rows))
        batch = ForwardBatch.build(rows, ids, range(len(ids)))
        expected, found = (model.forward(batch, slab) for model, slab in zip((eager, compiled), caches, strict=True))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@needs_compiler
def test_tokens_equal_those_of_the_eager_steps_over_a_long_schedule_in_one_compilation_per_bucket():
    config = BlockDiffusionConfig(mask_token_id=63, block_size=8)
    prompts = [tokens(seed, 1 + seed * 7 % 23) for seed in range(30)]
    decoding = [
        DecodingConfig(max_new_tokens=4 + i, block_size=size, small_block_size=min(size, 4), threshold=0.3)
        for i, size in enumerate([1, 8, 4] * 10)  # autoregressive and block rows in the same forwards
    ]

    def decode(model, count, max_batch):
        return generate_batch(
            model, config, prompts[:count], decoding[:count], STOPS, max_batch=max_batch, prefill_chunk=8
        ).answers

    eager, compiled = backbones("llama")
    torch._dynamo.reset()
    before = compilations()
    # Slabs of several sizes: none of them may cost compilations of its own.
    for count, max_batch in ((30, 2), (1, 1)):
        assert decode(compiled, count, max_batch) == decode(eager, count, max_batch)
    # Two rows of up to 8 positions: buckets of 1, 2, 3, 4, 6, 8, 12 and 16.
    assert 3 <= compilations() - before <= 8


@needs_compiler
def test_padding_writes_to_no_row():
    _, compiled = backbones("llama")
    slab = compiled.new_cache(2, 128)
    for flat in (*slab.flat_keys, *slab.flat_values):
        flat.fill_(7.0)
    rows = [RowSpan(1, 3, 8, 8, 8, 8)]  # five positions in a bucket of six
    for _ in range(3):
        logits = compiled.forward(ForwardBatch.build(rows, tokens(0, 5), range(5)), slab)
        assert logits.isfinite().all()
    for view in (*slab.keys, *slab.values):
        assert (view != 7.0).any(dim=(1, 3)).nonzero().tolist() == [[1, position] for position in range(3, 8)]
    for flat in (*slab.flat_keys, *slab.flat_values):
        assert flat.isfinite().all()


@needs_compiler
@pytest.mark.parametrize("step", STEPS)
def test_a_forward_copies_no_slab(step):
    _, compiled = backbones("llama")

    slab_bytes = compiled.new_cache(2, 2048).flat_keys[0].nbytes
    assert bytes_allocated(compiled, step, 512) == bytes_allocated(compiled, step, 2048) < slab_bytes / 8


@needs_compiler
def test_the_api_compiles_and_answers_alike(tmp_path):
    directory = save_tiny(tmp_path / "tiny", adapted=True)
    answers = [
        BlockDiffusionLM.from_pretrained(directory, dtype="float32", compile=compile).generate(
            [tokens(3, 11)], max_new_tokens=24, small_block_size=8
        )
        for compile in (False, True)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("dtype", "settings", "why"),
    [
        (torch.float32, {"int8": True}, "int8 weights are packed"),
        (torch.float64, {}, "float64"),
        (torch.float32, {"name": "hf"}, "needs the native backbone"),
    ],
)
def test_what_cannot_be_compiled_is_refused(dtype, settings, why):
    model = tiny_model("llama", dtype=dtype)
    checkpoint = Checkpoint(
        model=model,
        tokenizer=None,
        config=BlockDiffusionConfig(mask_token_id=63, block_size=8),
        stop_token_ids=(),
        origin="tiny",
    )
    with pytest.raises(FastDLLMError, match=why):
        make_backbone(checkpoint, compile=True, **settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replayed_graphs_give_the_tokens_of_the_eager_steps():
    # Heads of 16 at least: Triton's kernel multiplies in tiles of 16.
    model = tiny_model("llama", head_dim=16, seed=3).to("cuda")
    config = BlockDiffusionConfig(mask_token_id=63, block_size=8)
    decoding = DecodingConfig(max_new_tokens=40, small_block_size=4, threshold=0.3)
    prompts = [tokens(seed, length) for seed, length in enumerate([3, 30, 8, 17])]
    answers = [
        generate_batch(NativeBackbone(model, "block", compile=compile), config, prompts, decoding, STOPS).answers
        for compile in (False, True)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("queries", "heads", "forced"), [(32, 8, False), (64, 8, True), (96, 4, True), (128, 8, False)]
)
def test_on_a_gpu_the_decoding_kernel_is_left_out_where_it_has_no_tile(queries, heads, forced):
    keys = SimpleNamespace(is_cuda=True, shape=(1, 2, 256, 8))
    assert (_kernel_options((queries, heads, 8), keys) is not None) == forced
    assert _kernel_options((queries, heads, 8), SimpleNamespace(is_cuda=False, shape=(1, 2, 256, 8))) is None
