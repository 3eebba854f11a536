"""The held-out questions: as prompts, and their answers scored."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fast_dllm.bench.timing import WARM_UP
from fast_dllm.config import TaskItems
from fast_dllm.data.tasks import RESERVED_TEST_ITEMS, Item, is_correct
from fast_dllm.errors import FastDLLMError
from fast_dllm.evaluation.box import EASY_TASKS, unseen_questions
from fast_dllm.text import ChatText


@dataclass(frozen=True)
class Questions:
    """Items as a model's tokenizer writes them.

    Attributes:
        items: the questions.
        prompts: token ids of each.
        warm_up: token ids of a question that is not among them.
        text: the tokenizer.
    """

    items: Sequence[Item]
    prompts: Sequence[list[int]]
    warm_up: list[int]
    text: ChatText

    def chunk(self, repetition: int, batch: int) -> list[int]:
        """Numbers of the items that a repetition asks; the first ones again after the last."""
        return [(repetition * batch + i) % len(self.items) for i in range(batch)]

    def chunk_prompts(self, repetition: int, batch: int) -> list[list[int]]:
        """The prompts of a repetition, `WARM_UP` included."""
        if repetition == WARM_UP:
            return [self.warm_up] * batch
        return [self.prompts[number] for number in self.chunk(repetition, batch)]

    def is_right(self, number: int, answer: Sequence[int] | str) -> bool:
        """Whether an answer to item `number` is right, given as token ids or as text."""
        text = answer if isinstance(answer, str) else self.text.decode(answer)
        return is_correct(self.items[number], text)

    def long_prompt(self, length: int) -> list[int]:
        """A prompt of any length: questions one after another, cut at its beginning."""
        ids: list[int] = []
        while len(ids) < length:
            for prompt in self.prompts:
                ids += prompt
        return ids[-length:]


def ask_about(tokenizer: Any, count: int, *, seed: int, trained_on: Iterable[TaskItems] = ()) -> Questions:
    """Choose among the items that no training run has seen, and write them as prompts.

    Args:
        tokenizer: of the model; without a chat template the question is asked as plain text.
        count: how many items.
        seed: chooses them; 0 takes the first ones.
        trained_on: what the model knows.

    Raises:
        FastDLLMError: without a tokenizer, or without reasoning-gym.
    """
    if tokenizer is None:
        raise FastDLLMError("this model has no tokenizer; the benchmark asks its questions as text")
    *test, warm_up = unseen_questions(EASY_TASKS, RESERVED_TEST_ITEMS, trained_on)
    if seed:
        random.Random(seed).shuffle(test)
    text = ChatText(tokenizer)
    items = test[:count]
    return Questions(items, [_prompt(text, item) for item in items], _prompt(text, warm_up), text)


def _prompt(text: ChatText, item: Item) -> list[int]:
    if getattr(text.tokenizer, "chat_template", None):
        return text.prompt_ids(item.messages()[:1])
    return text.encode(f"{item.question}\n")
