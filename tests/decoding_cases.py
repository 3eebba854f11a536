"""Random decoding cases on tiny random models in float64, where no decision is near enough to a tie to flake."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import strategies as st

from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.decoding.reference import hf_logits, reference_generate
from fast_dllm.generation import generate_batch
from fast_dllm.model.backbone import ForwardBatch, RowSpan
from fast_dllm.model.compiled import why_not_compiled
from fast_dllm.model.hf import HFBackbone
from tiny import ARCHITECTURES, tiny_model

VOCABULARY = 64
MASK = 63
STOPS = (5, 9, 11, 17, 23, 31, 38)
"""Common enough among the tokens of a random model to end many answers."""


@cache
def confident_model(architecture, dtype=torch.float64):
    """A tiny model whose confidences spread from 0.01 to 1, so that steps reveal several tokens."""
    model = tiny_model(architecture, vocab_size=VOCABULARY, dtype=dtype, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(7)
    return model


def backbone(architecture, attention="block", dtype=torch.float64, kind=HFBackbone):
    return kind(confident_model(architecture, dtype), attention)


def tokens(seed, length):
    """A random prompt; no mask token in it."""
    return torch.randint(0, MASK, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class Case:
    architecture: str
    config: BlockDiffusionConfig
    prompt: list[int]
    decoding: DecodingConfig

    def decode(self, **changes):
        return decode(self, [self.prompt], [self.decoding], **changes)

    def reference(self):
        block_size, _ = self.decoding.layout(self.config, len(self.prompt) + self.decoding.max_new_tokens)
        logits_of = hf_logits(confident_model(self.architecture), self.config.context_attention, block_size)
        return reference_generate(logits_of, self.prompt, self.config, self.decoding, STOPS)


def decode(case, prompts, decodings, kind=HFBackbone, **settings):
    model = backbone(case.architecture, case.config.context_attention, kind=kind)
    return generate_batch(model, case.config, prompts, decodings, STOPS, **settings)


BLOCK_SIZES = (32, 8, 64, 4, 32, 1)


@st.composite
def layouts(draw, block_size):
    """A sub-block size: any divisor of the block."""
    return draw(st.sampled_from([size for size in (8, 16, 4, 64, 32, 8, 2, 1) if block_size % size == 0]))


@st.composite
def decodings(draw, *, full=False, cached=False, longest=70):
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    sampled = draw(st.booleans())
    return DecodingConfig(
        max_new_tokens=draw(st.integers(1, longest)),
        block_size=None if full else block_size,
        small_block_size=draw(st.sampled_from([8, 32, 5, 16, 3, 40, 1])) if full else draw(layouts(block_size)),
        policy=draw(st.sampled_from(["threshold", "factor", "fixed", "threshold", "factor", "sequential"])),
        threshold=draw(st.sampled_from([0.5, 0.2, 0.7, 0.4, 0.9, 1.0])),
        factor=draw(st.sampled_from([2.0, 1.0, 4.0, 0.5])),
        tokens_per_step=draw(st.integers(2, 6)),
        confidence=draw(st.sampled_from(["probability", "probability", "margin", "entropy"])),
        temperature=draw(st.sampled_from([0.5, 1.0, 1.5])) if sampled else 0.0,
        top_p=draw(st.sampled_from([0.5, 0.75, 1.0])),
        top_k=draw(st.sampled_from([0, 1, 3, 10, 64])),
        seed=draw(st.integers(0, 1000)),
        # None takes the checkpoint's, which do occur.
        stop_token_ids=draw(st.sampled_from([None, (), None, (5, 7, 29)])),
        sub_block_cache=draw(st.sampled_from(["none", "dual", "prefix"])) if cached else "none",
        cache_refresh=draw(st.sampled_from(["published", "sub-block", "block"])),
        fused_commit=draw(st.booleans()),
        verify=False,
    )


@st.composite
def models(draw):
    """Architecture and what its checkpoint is; the block size is the request's."""
    config = BlockDiffusionConfig(
        mask_token_id=MASK,
        block_size=draw(st.sampled_from([8, 32])),
        token_shift=draw(st.booleans()),
        context_attention=draw(st.sampled_from(["block", "causal", "full"])),
    )
    return draw(st.sampled_from(list(ARCHITECTURES))), config


prompts = st.builds(tokens, st.integers(0, 10_000), st.one_of(st.integers(1, 70), st.integers(1, 200)))


@st.composite
def cases(draw):
    architecture, config = draw(models())
    full = config.context_attention == "full"
    return Case(architecture, config, draw(prompts), draw(decodings(full=full)))


needs_compiler = pytest.mark.skipif(
    why_not_compiled(torch.device("cpu"), torch.float32, "dense") is not None, reason="nothing can be compiled here"
)

# Rows (slot, start, end, visible_end, noisy_from, block size): a prefill, two commits, and a mix of a sub-block,
# a commit and a block over what those left in the slots.
FORWARDS = [
    [RowSpan(0, 0, 16, 16, 16, 8)],
    [RowSpan(1, 0, 8, 8, 8, 8), RowSpan(2, 0, 8, 8, 8, 8)],
    [RowSpan(2, 10, 13, 16, 8, 8), RowSpan(0, 16, 24, 24, 24, 8), RowSpan(1, 8, 16, 16, 8, 8)],
    [RowSpan(0, 24, 40, 40, 32, 8)],
]

STEPS = {
    "a block": lambda end: [RowSpan(1, end - 8, end, end, end - 8, 8)],
    "a commit and the next block": lambda end: [RowSpan(1, end - 16, end, end, end - 8, 8)],
    "two commits of other lengths": lambda end: [
        RowSpan(0, end - 12, end, end, end - 8, 8),
        RowSpan(1, end - 16, end, end, end - 8, 8),
    ],
    "one token each, behind other contexts": lambda end: [
        RowSpan(0, end // 2 - 1, end // 2, end // 2, end // 2, 1),
        RowSpan(1, end - 1, end, end, end, 1),
    ],
}
"""Rows of a decoding step whose longest context ends at a position."""


def bytes_allocated(model, step, context):
    """Bytes that a forward over the rows of a step allocates, all of them together."""
    cache = model.new_cache(2, 2048)
    rows = STEPS[step](context)
    count = sum(row.length for row in rows)
    batch = ForwardBatch.build(rows, tokens(0, count), range(count))
    model.forward(batch, cache)
    with torch.profiler.profile(profile_memory=True) as profile:
        model.forward(batch, cache)
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
