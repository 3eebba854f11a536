"""Procedural tasks as a benchmark."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import DecodingConfig
from fast_dllm.data.tasks import Item, is_correct
from fast_dllm.evaluation.outcome import Outcome

MAX_NEW_TOKENS = 128
"""Limit of an answer: more than any worked solution takes."""


@dataclass(frozen=True)
class ProceduralBenchmark:
    """Questions with a verifier.

    Attributes:
        items: the questions.
        max_new_tokens: limit of an answer.
        name: how it is called in errors.
        decodes: answers are decoded.
    """

    items: Sequence[Item]
    max_new_tokens: int = MAX_NEW_TOKENS
    name: str = "procedural tasks"
    decodes: bool = True

    @property
    def count(self) -> int:
        """How many questions."""
        return len(self.items)

    @property
    def settings(self) -> dict[str, Any]:
        """What else it takes to ask the same again."""
        return {"max_new_tokens": self.max_new_tokens}

    def ask(
        self, lm: BlockDiffusionLM, decoding: DecodingConfig, *, max_batch: int, advance: Callable[[], None]
    ) -> Outcome:
        """Ask every question (see `Benchmark.ask`)."""
        prompts = [item.messages()[:1] for item in self.items]
        decoding = replace(decoding, max_new_tokens=self.max_new_tokens)
        right, statistics, cut = [], [], []
        for item, reply in zip(self.items, lm.answers(prompts, decoding, max_batch=max_batch), strict=True):
            right.append(is_correct(item, reply.text))
            statistics.append(reply.statistics)
            cut.append(reply.finish == "length")
            advance()
        return Outcome([item.task for item in self.items], right, statistics, cut)
