"""What the recipes of this repository train on, so that their models are asked nothing else."""

from collections.abc import Sequence
from functools import cache

from fast_dllm.data.tasks import RESERVED_TEST_ITEMS, Item, held_out_items, make_items
from fast_dllm.errors import FastDLLMError

EASY_TASKS = ("chain_sum", "leg_counting", "number_sorting", "basic_arithmetic")
"""Of the demo and the benchmark."""

TASKS_OF_THE_BOX = (*EASY_TASKS, "letter_counting", "word_sorting")
"""What the model in the box (`recipes/smollm2-*.json`) and its variants (`recipes/variants/`) were trained on."""

_TRAINED = ((EASY_TASKS, 16_000), (TASKS_OF_THE_BOX, 6_000))


@cache
def seen_in_training() -> frozenset[str]:
    """Questions that a recipe trained on; small tasks repeat some of them among held-out items."""
    seen: set[str] = set()
    for tasks, count in _TRAINED:
        reserved = {item.question for item in held_out_items(tasks, RESERVED_TEST_ITEMS, seed=0)}
        seen |= {item.question for item in make_items(tasks, count, seed=0, exclude=reserved)}
    return frozenset(seen)


def unseen_questions(tasks: Sequence[str], count: int) -> list[Item]:
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
