"""What the recipes of this repository train on, so that their models are asked nothing else."""

from collections.abc import Iterable, Sequence
from functools import cache

from fast_dllm.config import TaskItems
from fast_dllm.data.tasks import RESERVED_TEST_ITEMS, Item, held_out_items, make_items
from fast_dllm.errors import FastDLLMError

EASY_TASKS = ("chain_sum", "leg_counting", "number_sorting", "basic_arithmetic")
"""Of the demo and the benchmark."""

TASKS_OF_THE_BOX = (*EASY_TASKS, "letter_counting", "word_sorting")
"""What the model in the box (`recipes/smollm2-*.json`) and its variants (`recipes/variants/`) were trained on."""

_TRAINED = (TaskItems(EASY_TASKS, 16_000), TaskItems(TASKS_OF_THE_BOX, 6_000))


def seen_in_training(trained_on: Iterable[TaskItems] = ()) -> frozenset[str]:
    """Questions that a recipe of this repository, or a model, was trained on.

    Other tasks, or more items of the same, come upon questions of the training among their held-out items.

    Args:
        trained_on: of the model.
    """
    return frozenset().union(*(_questions(entry) for entry in (*_TRAINED, *trained_on)))


@cache
def _questions(trained: TaskItems) -> frozenset[str]:
    reserved = {item.question for item in held_out_items(trained.tasks, RESERVED_TEST_ITEMS, seed=0)}
    return frozenset(item.question for item in make_items(trained.tasks, trained.items, seed=0, exclude=reserved))


def unseen_questions(tasks: Sequence[str], count: int, trained_on: Iterable[TaskItems] = ()) -> list[Item]:
    """Questions for a test.

    Args:
        tasks: names in `data.tasks.TASKS`.
        count: how many, over all tasks; no recipe of this repository trains on any of them.
        trained_on: what the models that are asked know besides.

    Raises:
        FastDLLMError: for an unknown task, or more questions than there are.
    """
    seen = seen_in_training(trained_on)
    # Twice as many as asked for: some tasks are small, and half of their questions may have been trained on.
    held_out = held_out_items(tasks, 2 * count, seed=0)
    items = [item for item in held_out if item.question not in seen][:count]
    if len(items) < count:
        raise FastDLLMError(f"only {len(items)} held-out questions are left of these tasks; lower --items")
    return items
