"""Decoding on the clock, its prefill left out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import DecodingConfig
from fast_dllm.decoding.events import Event, ForwardKind
from fast_dllm.generation import GenerateResult, generate_batch


@dataclass(frozen=True)
class Decoded:
    """Answers, and how fast they came after the prefill.

    Attributes:
        result: the answers.
        tokens: that became final after the last prefill, over all rows.
        seconds: from the last prefill to the end.
    """

    result: GenerateResult
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the prefill."""
        return self.tokens / self.seconds


def decode(lm: BlockDiffusionLM, prompts: Sequence[list[int]], decoding: DecodingConfig) -> Decoded:
    """Answer prompts, all at once.

    Args:
        lm: the model.
        prompts: token ids; those shorter than a block have no prefill, and are timed from the start.
        decoding: settings of all.
    """
    settled = [len(prompt) for prompt in prompts]
    before = sum(settled)
    started = time.perf_counter()

    def watch(event: Event) -> None:
        nonlocal started, before
        settled[event.request] = event.settled
        if event.kind is ForwardKind.PREFILL:
            started, before = time.perf_counter(), sum(settled)

    stops = lm.checkpoint.stop_token_ids
    result = generate_batch(lm.backbone, lm.config, prompts, decoding, stops, max_batch=len(prompts), on_event=watch)
    return Decoded(result, sum(settled) - before, time.perf_counter() - started)
