"""Random samples for training tests."""

import random
from collections.abc import Iterator

from fast_dllm.data.chat import Sample
from fast_dllm.data.mixture import shuffled


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
