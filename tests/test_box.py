"""The model in the box."""

from pathlib import Path

import pytest

from fast_dllm import BlockDiffusionLM
from fast_dllm.checkpoint.load import IN_THE_BOX
from fast_dllm.data.tasks import is_correct
from fast_dllm.evaluation.box import EASY_TASKS, unseen_questions

ASSETS = Path(__file__).parent.parent / "src" / "fast_dllm" / "assets"


def test_its_adapters_are_small_enough_to_ship():
    sizes = {name: sum(path.stat().st_size for path in (ASSETS / name).iterdir()) for name in IN_THE_BOX}
    assert sizes["smollm2"] < 2.5e6
    assert sizes["smollm2-ar"] < 4e6


@pytest.mark.slow
def test_it_answers_as_its_fine_tune_does_at_two_tokens_a_forward():
    model, tuned = (BlockDiffusionLM.from_pretrained(name) for name in IN_THE_BOX)
    items = unseen_questions(EASY_TASKS, 40)
    replies = [model.chat(item.messages()[:1]) for item in items]
    assert [reply.text for reply in replies] == [tuned.chat(item.messages()[:1]).text for item in items]
    right = sum(is_correct(item, reply.text) for item, reply in zip(items, replies, strict=True))
    tokens = sum(reply.statistics.new_tokens for reply in replies)
    forwards = sum(reply.statistics.forwards for reply in replies)
    assert right / len(items) > 0.8
    assert tokens / forwards > 2
