"""Random samples and short recipes for training tests."""

import random
from collections.abc import Iterator
from dataclasses import replace

from fast_dllm.data.chat import Sample
from fast_dllm.data.mixture import shuffled
from fast_dllm.training.options import AdaptOptions

SHORT = AdaptOptions(
    steps=6,
    batch_size=4,
    learning_rate=1e-2,
    warmup_steps=0,
    max_length=64,
    block_size=8,
    save_every=2,
    lora_rank=4,
    # "auto" is bfloat16 on a CPU with matrix units, where sums in another order differ by more than tests allow.
    dtype="float32",
)
"""Adapt a tiny model."""

GATED = replace(SHORT, context_attention="causal", gated_lora=True, mask_ratio=1.0)
"""Teach a tiny model to draft."""


def make_samples(count: int = 24) -> list[Sample]:
    """Token ids from 4 to 53 with the second half as the answer."""
    rng = random.Random(0)
    samples = []
    for _ in range(count):
        length = rng.randrange(6, 40)
        ids = [rng.randrange(4, 54) for _ in range(length)]
        samples.append(Sample(input_ids=ids, loss_mask=[i >= length // 2 for i in range(length)]))
    return samples


def stream_samples(epoch: int) -> Iterator[Sample]:
    """48 of them, in another order every epoch, as data that does not fit into memory comes."""
    return shuffled(make_samples(48), 16, seed=epoch)
