"""From data sets or tasks to samples for training: some held out, all rendered with a model's own chat template."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fast_dllm.data.chat import Sample, render
from fast_dllm.data.mixture import mix, shuffled
from fast_dllm.data.sources import BadRows, Document, Source, parse_sources, read_documents
from fast_dllm.data.tasks import RESERVED_TEST_ITEMS, Item, train_and_test
from fast_dllm.errors import FastDLLMError


@dataclass(frozen=True)
class Conversations:
    """Conversations, or texts, to train on, and others to measure with.

    Attributes:
        train: in the order they were read or drawn; one that is drawn again is the same object.
        held_out: not trained on.
        bad: the rows that could not be used.

    """

    train: list[Document]
    held_out: list[Document]
    bad: BadRows = field(default_factory=BadRows)


@dataclass(frozen=True)
class TrainingData:
    """Samples to train on.

    Attributes:
        samples: each with a loss position.
        held_out: samples that are not trained on.
        truncated: samples cut to the maximal length, held-out ones and dropped ones included.
        dropped: samples without a loss position after that.
        lost_ends: assistant turns whose end-of-turn token was cut off.
        skipped: rows that could not be used.

    """

    samples: list[Sample]
    held_out: list[Sample]
    truncated: int
    dropped: int
    lost_ends: int = 0
    skipped: int = 0

    def describe(self, max_length: int) -> str:
        """One line on what there is, and on everything that was lost."""
        parts = [f"{len(self.samples)}, {len(self.held_out)} held out"]
        if self.truncated:
            parts.append(f"{self.truncated} cut to --max-length {max_length}")
        if self.lost_ends:
            parts.append(f"end-of-turn tokens lost by that: {self.lost_ends}")
        if self.dropped:
            parts.append(f"{self.dropped} dropped: nothing of their answers was left")
        if self.skipped:
            parts.append(f"bad rows skipped: {self.skipped}")
        return "; ".join(parts)


def gather_conversations(
    data: object | None,
    tasks: Sequence[str],
    *,
    task_items: int,
    held_out: int,
    skip_bad_rows: bool = False,
    seed: int = 0,
) -> Conversations:
    """Read or make conversations.

    Several sources follow each other. Where one has a weight, they are drawn by `mix` instead, those without a weight
    with weight 1.

    Args:
        data: what `parse_sources` takes, or None for tasks.
        tasks: as for `make_items`.
        task_items: training items, over all tasks.
        held_out: at most so many are held out: fresh task items, or the last 5% of each source.
        skip_bad_rows: leave out and count rows that cannot be used; otherwise the first is an error.
        seed: of the draws.

    Raises:
        FastDLLMError: for bad data or an unknown task.

    """
    bad = BadRows(skip=skip_bad_rows)
    if data is None:
        # One data set for all runs: what one run is tested on, no other may have learned.
        train, test = train_and_test(tasks, task_items, max(held_out, RESERVED_TEST_ITEMS), seed=0)
        return Conversations(_as_documents(train, "item"), _as_documents(test[:held_out], "held-out item"), bad)
    sources = parse_sources(data)
    parts = [list(read_documents(source, bad)) for source in sources]
    total = sum(map(len, parts))
    kept = [len(part) - min(held_out * len(part) // total, len(part) // 20) for part in parts]
    trained = [part[:end] for part, end in zip(parts, kept, strict=True)]
    return Conversations(
        train=list(_drawn(sources, trained, seed)),
        held_out=[document for part, end in zip(parts, kept, strict=True) for document in part[end:]],
        bad=bad,
    )


def stream_documents(data: object, *, shuffle_buffer: int, seed: int, bad: BadRows) -> Iterator[Document]:
    """Documents of data that does not fit into memory, mixed and shuffled on the way.

    Args:
        data: what `parse_sources` takes. Sources without weights are mixed evenly, each row once.
        shuffle_buffer: documents held to choose the next one from; 1 or less keeps the order.
        seed: of the draws and the shuffle.
        bad: told of every row that cannot be used.

    Raises:
        FastDLLMError: for bad data, while it is read.

    """
    sources = parse_sources(data)
    opened = [partial(read_documents, source, bad, stream=True) for source in sources]
    documents = mix(opened, _weights(sources), seed=seed)
    return shuffled(documents, shuffle_buffer, seed=seed) if shuffle_buffer > 1 else documents


def render_documents(
    tokenizer: Any, documents: Iterable[Document], *, max_length: int, bad: BadRows
) -> Iterator[Sample]:
    """Samples of documents, one after another: nothing is held.

    Args:
        tokenizer: the model's.
        documents: what to render.
        max_length: longer conversations are cut, longer texts split.
        bad: told of every document that the chat template refuses.

    Raises:
        FastDLLMError: as `bad` does.

    """
    for document in documents:
        try:
            yield from render(tokenizer, document.content, max_length=max_length)
        except FastDLLMError as error:
            bad.add(document.place, error)


def render_conversations(tokenizer: Any, conversations: Conversations, *, max_length: int) -> TrainingData:
    """Render conversations with a model's chat template.

    Args:
        tokenizer: the model's.
        conversations: what to render.
        max_length: longer conversations are cut, longer texts split.

    Raises:
        FastDLLMError: for a conversation that the template refuses, or when no answer begins before `max_length`.

    """
    bad, once = conversations.bad, {id(document): document for document in conversations.train}
    rendered = {
        key: list(render_documents(tokenizer, [document], max_length=max_length, bad=bad))
        for key, document in once.items()
    }
    train = [sample for document in conversations.train for sample in rendered[id(document)]]
    held_out = list(render_documents(tokenizer, conversations.held_out, max_length=max_length, bad=bad))
    data = TrainingData(
        samples=[sample for sample in train if any(sample.loss_mask)],
        held_out=[sample for sample in held_out if any(sample.loss_mask)],
        truncated=sum(sample.truncated for sample in [*train, *held_out]),
        dropped=sum(not any(sample.loss_mask) for sample in [*train, *held_out]),
        lost_ends=sum(sample.lost_ends for sample in [*train, *held_out]),
        skipped=bad.count,
    )
    if not train:
        raise FastDLLMError(f"no conversation can be used; the first: {bad.examples[0]}")
    if not data.samples:
        place = conversations.train[0].place
        raise FastDLLMError(
            f"{place}, as all others: the answer begins behind max_length={max_length} tokens; raise --max-length"
        )
    return data


def _as_documents(items: Iterable[Item], name: str) -> list[Document]:
    return [Document(item.messages(), f"{item.task} {name} {number}") for number, item in enumerate(items, start=1)]


def _drawn(sources: Sequence[Source], parts: Sequence[list[Document]], seed: int) -> Iterator[Document]:
    weights = _weights(sources)
    if weights is None:
        return (document for part in parts for document in part)
    return mix([partial(iter, part) for part in parts], weights, seed=seed)


def _weights(sources: Sequence[Source]) -> list[float] | None:
    if len(sources) == 1 or all(source.weight is None for source in sources):
        return None
    return [1.0 if source.weight is None else source.weight for source in sources]
