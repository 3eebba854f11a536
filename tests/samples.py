"""Random samples for training tests."""

import random

from fast_dllm.data.chat import Sample


def make_samples(count: int = 24) -> list[Sample]:
    """Token ids from 4 to 53 with the second half as the answer."""
    rng = random.Random(0)
    samples = []
    for _ in range(count):
        length = rng.randrange(6, 40)
        ids = [rng.randrange(4, 54) for _ in range(length)]
        samples.append(Sample(input_ids=ids, loss_mask=[i >= length // 2 for i in range(length)]))
    return samples
