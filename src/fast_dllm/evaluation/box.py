"""What the model in the box was trained on, so that it is asked nothing else."""

from fast_dllm.data.tasks import held_out_items, make_items

TASKS_OF_THE_BOX = ("chain_sum", "leg_counting", "number_sorting", "basic_arithmetic")


def seen_by_the_box() -> set[str]:
    """Questions that `recipes/smollm2-*.json` trained on; small tasks repeat some of them among held-out items."""
    reserved = {item.question for item in held_out_items(TASKS_OF_THE_BOX, 200, seed=0)}
    return {item.question for item in make_items(TASKS_OF_THE_BOX, 16_000, seed=0, exclude=reserved)}
