"""From a data set or tasks to samples for training: some held out, all rendered with a model's own chat template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fast_dllm.data.chat import Sample, render_chat
from fast_dllm.data.sources import load_chats
from fast_dllm.data.tasks import RESERVED_TEST_ITEMS, train_and_test
from fast_dllm.errors import FastDLLMError


@dataclass(frozen=True)
class TrainingData:
    """Samples to train on.

    Attributes:
        samples: each with a loss position.
        held_out: samples that are not trained on.
        truncated: samples cut to the maximal length, held-out ones and dropped ones included.
        dropped: samples without a loss position after that.
    """

    samples: list[Sample]
    held_out: list[Sample]
    truncated: int
    dropped: int


@dataclass(frozen=True)
class Conversations:
    """Conversations to train on, and others to measure with.

    Attributes:
        train: lists of messages.
        held_out: not trained on.
        source: the file or data set, or None for tasks.
    """

    train: list[Any]
    held_out: list[Any]
    source: str | None


def gather_conversations(data: str | None, tasks: Sequence[str], *, task_items: int, held_out: int) -> Conversations:
    """Read or make conversations.

    Args:
        data: what `load_chats` takes, or None for tasks.
        tasks: as for `make_items`.
        task_items: training items, over all tasks.
        held_out: at most so many are held out: fresh task items, or the last 5% of the data.

    Raises:
        FastDLLMError: for bad data or an unknown task.
    """
    if data is not None:
        chats: list[Any] = list(load_chats(data))
        kept = len(chats) - min(held_out, len(chats) // 20)
        return Conversations(chats[:kept], chats[kept:], data)
    # One data set for all runs: what one run is tested on, no other may have learned.
    train, test = train_and_test(tasks, task_items, max(held_out, RESERVED_TEST_ITEMS), seed=0)
    return Conversations([item.messages() for item in train], [item.messages() for item in test[:held_out]], None)


def render_conversations(tokenizer: Any, conversations: Conversations, *, max_length: int) -> TrainingData:
    """Render conversations with a model's chat template.

    Args:
        tokenizer: the model's.
        conversations: what to render.
        max_length: longer samples are cut.

    Raises:
        FastDLLMError: for a conversation that the template refuses, or when no answer begins before `max_length`.
    """
    train = _render(tokenizer, conversations.train, max_length, conversations.source, first=1)
    held_out = _render(
        tokenizer, conversations.held_out, max_length, conversations.source, first=len(conversations.train) + 1
    )
    data = TrainingData(
        samples=[sample for sample in train if any(sample.loss_mask)],
        held_out=[sample for sample in held_out if any(sample.loss_mask)],
        truncated=sum(sample.truncated for sample in [*train, *held_out]),
        dropped=sum(not any(sample.loss_mask) for sample in [*train, *held_out]),
    )
    if not data.samples:
        raise FastDLLMError(
            f"{conversations.source or 'tasks'}: every conversation's answer begins behind max_length={max_length} "
            "tokens; raise --max-length"
        )
    return data


def _render(tokenizer: Any, chats: Sequence[Any], max_length: int, source: str | None, *, first: int) -> list[Sample]:
    samples = []
    for number, messages in enumerate(chats, start=first):
        try:
            samples.append(render_chat(tokenizer, messages, max_length=max_length))
        except FastDLLMError as error:
            place = "" if source is None else f"{source}: conversation {number}: "
            raise FastDLLMError(f"{place}{error}") from error
    return samples
