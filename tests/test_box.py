"""The model in the box."""

from pathlib import Path

import pytest

from fast_dllm import BlockDiffusionLM
from fast_dllm.data.tasks import is_correct
from fast_dllm.evaluation.box import TASKS_OF_THE_BOX, unseen_questions

ADAPTER = Path(__file__).parent.parent / "src" / "fast_dllm" / "assets" / "smollm2"


def test_the_adapter_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in ADAPTER.iterdir()) < 25e6


@pytest.mark.slow
def test_it_solves_most_easy_items_at_two_tokens_a_forward():
    model = BlockDiffusionLM.from_pretrained("smollm2")
    items = unseen_questions(TASKS_OF_THE_BOX, 40)
    replies = [model.chat(item.messages()[:1]) for item in items]
    right = sum(is_correct(item, reply.text) for item, reply in zip(items, replies, strict=True))
    tokens = sum(reply.statistics.new_tokens for reply in replies)
    forwards = sum(reply.statistics.forwards for reply in replies)
    assert right / len(items) > 0.6
    assert tokens / forwards > 2
