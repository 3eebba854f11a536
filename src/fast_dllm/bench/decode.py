"""Decoding on the clock, the prompt left out."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import DecodingConfig
from fast_dllm.decoding.events import Event
from fast_dllm.generation import GenerateResult, generate_batch, make_engine


@dataclass(frozen=True)
class Pace:
    """How fast answers came after the prompt.

    Attributes:
        tokens: of the answers, over all rows, that were revealed behind the last forward that prefilled. Those that it
            revealed itself, as a first token or a draft, are left out as its time is.
        forwards: rows' forwards after it, those of all rows added up.
        seconds: from the end of that forward to the end.
    """

    tokens: int
    forwards: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the prompt."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Decoded(Pace):
    """A pace, and the answers.

    Attributes:
        result: the answers.
    """

    result: GenerateResult


class _Clock:
    """Starts anew behind every forward that prefilled, were it also a first look at a block.

    A request that commits no prompt (one shorter than a block, or over the whole canvas) is timed from the start.
    """

    def __init__(self) -> None:
        self._settled: dict[int, int] = {}
        self._start()

    def _start(self) -> None:
        self._revealed: dict[int, set[int]] = defaultdict(set)
        self._forwards = 0
        self._started = time.perf_counter()

    def watch(self, event: Event) -> None:
        """Note what a forward revealed."""
        self._settled[event.request] = event.settled
        # A draft that was taken back is revealed again, so positions are counted, not events.
        self._revealed[event.request].update(event.positions)
        self._forwards += 1
        if event.prefilled:
            self._start()

    def stop(self) -> Pace:
        """What was decoded since the last prefill."""
        seconds = time.perf_counter() - self._started
        # What was revealed behind a stop token or the limit is no part of the answer.
        found = ((place, self._settled[row]) for row, places in self._revealed.items() for place in places)
        return Pace(sum(place < end for place, end in found), self._forwards, seconds)


def decode(lm: BlockDiffusionLM, prompts: Sequence[list[int]], decoding: DecodingConfig) -> Decoded:
    """Answer prompts, all at once.

    Args:
        lm: the model.
        prompts: token ids.
        decoding: settings of all.
    """
    clock = _Clock()
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
        for prompt in self._prompts:
            self._engine.submit(prompt, decoding)
        clock = _Clock()
        for event in self._engine.run():
            clock.watch(event)
        return clock.stop()
