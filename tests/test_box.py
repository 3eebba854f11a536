"""The model in the box."""

from pathlib import Path

import pytest

from fast_dllm import BlockDiffusionLM
from fast_dllm.data.tasks import RESERVED_TEST_ITEMS, is_correct, train_and_test
from fast_dllm.demo.run import TASKS_OF_THE_BOX

ADAPTER = Path(__file__).parent.parent / "src" / "fast_dllm" / "assets" / "smollm2"


def test_the_adapter_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in ADAPTER.iterdir()) < 25e6


@pytest.mark.slow
def test_it_solves_most_easy_items_at_two_tokens_a_forward():
    model = BlockDiffusionLM.from_pretrained("smollm2")
    items = train_and_test(TASKS_OF_THE_BOX, 4, RESERVED_TEST_ITEMS, seed=0)[1][:40]
    replies = [model.chat(item.messages()[:1], threshold=0.9) for item in items]
    right = sum(is_correct(item, reply.text) for item, reply in zip(items, replies, strict=True))
    tokens = sum(reply.statistics.new_tokens for reply in replies)
    forwards = sum(reply.statistics.forwards for reply in replies)
    assert right / len(items) > 0.6
    assert tokens / forwards > 2
