"""Procedural tasks as a benchmark."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import DecodingConfig
from fast_dllm.data.tasks import Item, held_out_items, is_correct
from fast_dllm.errors import FastDLLMError
from fast_dllm.evaluation.box import seen_in_training
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
        right, statistics = [], []
        for item, reply in zip(self.items, lm.answers(prompts, decoding, max_batch=max_batch), strict=True):
            right.append(is_correct(item, reply.text))
            statistics.append(reply.statistics)
            advance()
        return Outcome([item.task for item in self.items], right, statistics)


def held_out_questions(tasks: Sequence[str], count: int) -> list[Item]:
    """Questions for a test.

    Args:
        tasks: names in `data.tasks.TASKS`.
        count: how many, over all tasks; no recipe of this repository trains on any of them.

    Raises:
        FastDLLMError: for an unknown task, or more questions than there are.
    """
    seen = seen_in_training()
    # Twice as many as asked for: some tasks are small, and half of their questions may have been trained on.
    held_out = held_out_items(tasks, 2 * count, seed=0)
    items = [item for item in held_out if item.question not in seen][:count]
    if len(items) < count:
        raise FastDLLMError(f"only {len(items)} held-out questions are left of these tasks; lower --items")
    return items
