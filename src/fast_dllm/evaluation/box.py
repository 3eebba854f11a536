"""What the recipes of this repository train on, so that their models are asked nothing else."""

from fast_dllm.data.tasks import RESERVED_TEST_ITEMS, held_out_items, make_items

TASKS_OF_THE_BOX = ("chain_sum", "leg_counting", "number_sorting", "basic_arithmetic")
"""Of the model in the box (`recipes/smollm2-*.json`)."""

TASKS_OF_THE_VARIANTS = (*TASKS_OF_THE_BOX, "letter_counting", "word_sorting")
"""Of the models that are compared with each other (`recipes/variants/`)."""

_TRAINED = ((TASKS_OF_THE_BOX, 16_000), (TASKS_OF_THE_VARIANTS, 6_000))


def seen_in_training() -> set[str]:
    """Questions that a recipe trained on; small tasks repeat some of them among held-out items."""
    seen = set()
    for tasks, count in _TRAINED:
        reserved = {item.question for item in held_out_items(tasks, RESERVED_TEST_ITEMS, seed=0)}
        seen |= {item.question for item in make_items(tasks, count, seed=0, exclude=reserved)}
    return seen
