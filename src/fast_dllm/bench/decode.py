"""Decoding on the clock, its prefill left out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import DecodingConfig
from fast_dllm.decoding.events import Event, ForwardKind
from fast_dllm.generation import GenerateResult, generate_batch, make_engine


@dataclass(frozen=True)
class Pace:
    """How fast answers came after the prefill.

    Attributes:
        tokens: that became final after the last prefill, over all rows.
        forwards: rows' forwards after it, those of all rows added up.
        seconds: from the last prefill to the end.
    """

    tokens: int
    forwards: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the prefill."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Decoded(Pace):
    """A pace, and the answers.

    Attributes:
        result: the answers.
    """

    result: GenerateResult


class _Clock:
    """Starts anew with every prefill. Requests shorter than a block have none, and are timed from the start."""

    def __init__(self, settled: dict[int, int]) -> None:
        """Start.

        Args:
            settled: by request, the tokens of its prompt.
        """
        self._settled = dict(settled)
        self._start()

    def _start(self) -> None:
        self._before = sum(self._settled.values())
        self._forwards = 0
        self._started = time.perf_counter()

    def watch(self, event: Event) -> None:
        """Note what a forward settled."""
        self._settled[event.request] = event.settled
        self._forwards += 1
        if event.kind is ForwardKind.PREFILL:
            self._start()

    def stop(self) -> Pace:
        """What was decoded since the last prefill."""
        seconds = time.perf_counter() - self._started
        return Pace(sum(self._settled.values()) - self._before, self._forwards, seconds)


def decode(lm: BlockDiffusionLM, prompts: Sequence[list[int]], decoding: DecodingConfig) -> Decoded:
    """Answer prompts, all at once.

    Args:
        lm: the model.
        prompts: token ids.
        decoding: settings of all.
    """
    clock = _Clock({number: len(prompt) for number, prompt in enumerate(prompts)})
    result = generate_batch(
        lm.backbone,
        lm.config,
        prompts,
        decoding,
        lm.checkpoint.stop_token_ids,
        max_batch=len(prompts),
        on_event=clock.watch,
    )
    return Decoded(**vars(clock.stop()), result=result)


class Continuation:
    """Prompts whose K/V are in a cache: decoding after them time and again computes them once."""

    def __init__(self, lm: BlockDiffusionLM, prompts: Sequence[list[int]], decodings: Sequence[DecodingConfig]) -> None:
        """Prefill, by answering with each of the settings once.

        Args:
            lm: the model.
            prompts: token ids, answered all at once.
            decodings: settings that `decode` will be asked for.
        """
        self._prompts = prompts
        requests = [(prompt, decoding) for decoding in decodings for prompt in prompts]
        stops = lm.checkpoint.stop_token_ids
        self._engine, _ = make_engine(
            lm.backbone, lm.config, requests, stops, max_batch=len(prompts), prefix_cache=True
        )
        for _ in self._engine.run():
            pass

    def decode(self, decoding: DecodingConfig) -> Pace:
        """Answer again."""
        requests = [self._engine.submit(prompt, decoding) for prompt in self._prompts]
        clock = _Clock({request.id: request.state.prompt_length for request in requests})
        for event in self._engine.run():
            clock.watch(event)
        return clock.stop()
