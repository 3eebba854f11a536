"""From data sets or tasks to samples for training: some held out, all rendered with a model's own chat template."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

from fast_dllm.data.chat import Sample
from fast_dllm.data.mixture import mix, shuffled
from fast_dllm.data.rendering import render_documents
from fast_dllm.data.sources import BadRows, Document, parse_sources, read_documents
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


@dataclass
class Counts:
    """What became of samples.

    Attributes:
        used: samples with a loss position.
        truncated: samples cut to the maximal length, dropped ones included.
        dropped: samples without a loss position after that.
        lost_ends: assistant turns whose end-of-turn token was cut off.
    """

    used: int = 0
    truncated: int = 0
    dropped: int = 0
    lost_ends: int = 0

    def usable(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Count samples on their way, and keep those with a loss position."""
        for sample in samples:
            self.truncated += sample.truncated
            self.lost_ends += sample.lost_ends
            if any(sample.loss_mask):
                self.used += 1
                yield sample
            else:
                self.dropped += 1

    def describe(self, held_out: int, skipped: int, max_length: int) -> str:
        """One line on what there is, and on everything that was lost.

        Args:
            held_out: samples of `used` that are not trained on.
            skipped: rows that could not be used.
            max_length: of a sample.
        """
        parts = [f"{self.used - held_out}, {held_out} held out"]
        if self.truncated:
            parts.append(f"{self.truncated} cut to --max-length {max_length}")
        if self.lost_ends:
            parts.append(f"end-of-turn tokens lost by that: {self.lost_ends}")
        if self.dropped:
            parts.append(f"{self.dropped} dropped: nothing of their answers was left")
        if skipped:
            parts.append(f"bad rows skipped: {skipped}")
        return "; ".join(parts)


@dataclass(frozen=True)
class TrainingData:
    """Samples to train on.

    Attributes:
        samples: each with a loss position.
        held_out: samples that are not trained on.
        counts: of both.
        skipped: rows that could not be used.
    """

    samples: list[Sample]
    held_out: list[Sample]
    counts: Counts
    skipped: int = 0

    def describe(self, max_length: int) -> str:
        """One line on what there is, and on everything that was lost."""
        return self.counts.describe(len(self.held_out), self.skipped, max_length)


def gather_conversations(
    data: object | None,
    tasks: Sequence[str],
    *,
    task_items: int,
    held_out: int,
    skip_bad_rows: bool = False,
    seed: int = 0,
) -> Conversations:
    """Read and make conversations.

    Several sources follow each other, the tasks before them as one. Where a source has a weight, they are drawn by
    `mix` instead, those without a weight, and the tasks, with weight 1.

    Args:
        data: what `parse_sources` takes, or None for tasks alone.
        tasks: as for `make_items`; none for data alone.
        task_items: training items, over all tasks.
        held_out: at most so many are held out: fresh task items (of which there are 200), or the last 5% of each
            source.
        skip_bad_rows: leave out and count rows that cannot be used; otherwise the first is an error.
        seed: of the draws.

    Raises:
        FastDLLMError: for bad data or an unknown task.
    """
    bad = BadRows(skip=skip_bad_rows)
    sources = [] if data is None else parse_sources(data)
    read = [list(read_documents(source, bad)) for source in sources]
    total = sum(map(len, read)) + (task_items if tasks else 0)
    parts = [_split(part, min(held_out * len(part) // total, len(part) // 20)) for part in read]
    weights = [source.weight for source in sources]
    if tasks:
        # Not more for a large `held_out`: a checkpoint says what it learned by the tasks and a count alone.
        train, test = task_documents(tasks, task_items)
        parts, weights = [(train, test[: held_out * task_items // total]), *parts], [None, *weights]
    return Conversations(
        train=list(_drawn([trained for trained, _ in parts], weights, seed)),
        held_out=[document for _, left in parts for document in left],
        bad=bad,
    )


def task_documents(tasks: Sequence[str], count: int) -> tuple[list[Document], list[Document]]:
    """Generated items to train on, and others to measure with: the same for all runs, and none is in both.

    Args:
        tasks: as for `make_items`.
        count: training items, over all tasks.

    Raises:
        FastDLLMError: for an unknown task.
    """
    # One data set for all runs: what one run is tested on, no other may have learned.
    train, test = train_and_test(tasks, count, RESERVED_TEST_ITEMS, seed=0)
    return _as_documents(train, "item"), _as_documents(test, "held-out item")


def stream_documents(
    data: object | None,
    made: Sequence[Document] = (),
    *,
    shuffle_buffer: int,
    seed: int,
    bad: BadRows,
    epoch: int = 0,
) -> Iterator[Document]:
    """Documents of data that does not fit into memory, mixed and shuffled on the way.

    Args:
        data: what `parse_sources` takes, or None for `made` alone. Sources without weights are mixed evenly, each row
            once.
        made: documents that are one more source, without a weight: `task_documents`.
        shuffle_buffer: documents held to choose the next one from; 1 or less keeps the order.
        seed: of the draws and the shuffle.
        bad: told of every row that cannot be used.
        epoch: how often the data has been read before; it is drawn and shuffled anew each time.

    Raises:
        FastDLLMError: for bad data, while it is read.
    """
    sources = [] if data is None else parse_sources(data)
    opened: list[Callable[[], Iterable[Document]]] = [partial(iter, made)] if made else []
    opened += [partial(read_documents, source, bad, stream=True) for source in sources]
    shares = _shares([*[None] * bool(made), *(source.weight for source in sources)])
    documents = mix(opened, shares, seed=f"{seed}-{epoch}")
    return shuffled(documents, shuffle_buffer, seed=f"{seed}-{epoch}") if shuffle_buffer > 1 else documents


def render_conversations(
    tokenizer: Any, conversations: Conversations, *, max_length: int, workers: int = 0
) -> TrainingData:
    """Render conversations with a model's chat template.

    Args:
        tokenizer: the model's.
        conversations: what to render.
        max_length: longer conversations are cut, longer texts split.
        workers: as for `render_documents`.

    Raises:
        FastDLLMError: for a conversation that the template refuses, or when no answer begins before `max_length`.
    """
    bad, once = conversations.bad, {id(document): document for document in conversations.train}
    samples = render_documents(tokenizer, once.values(), max_length=max_length, bad=bad, workers=workers)
    rendered = dict(zip(once, samples, strict=True))
    counts = Counts()
    train = [sample for document in conversations.train for sample in rendered[id(document)]]
    held_out = chain.from_iterable(render_documents(tokenizer, conversations.held_out, max_length=max_length, bad=bad))
    data = TrainingData(list(counts.usable(train)), list(counts.usable(held_out)), counts, bad.count)
    if not data.samples:
        raise nothing_to_learn(conversations.train[0].place if train else None, bad, max_length)
    return data


def nothing_to_learn(place: str | None, bad: BadRows, max_length: int) -> FastDLLMError:
    """The error of data without a sample to train on.

    Args:
        place: of the first document that was rendered; None when none could be.
        bad: what was wrong with the others.
        max_length: of a sample.
    """
    if place is None:
        return FastDLLMError("; the first: ".join(["no conversation can be used", *bad.examples[:1]]))
    return FastDLLMError(
        f"{place}, as all others: the answer begins behind max_length={max_length} tokens; raise --max-length"
    )


def _as_documents(items: Iterable[Item], name: str) -> list[Document]:
    return [Document(item.messages(), f"{item.task} {name} {number}") for number, item in enumerate(items, start=1)]


def _split(documents: list[Document], held_out: int) -> tuple[list[Document], list[Document]]:
    end = len(documents) - held_out
    return documents[:end], documents[end:]


def _drawn(parts: Sequence[list[Document]], weights: Sequence[float | None], seed: int) -> Iterator[Document]:
    shares = _shares(weights)
    if shares is None:
        return (document for part in parts for document in part)
    return mix([partial(iter, part) for part in parts], shares, seed=seed)


def _shares(weights: Sequence[float | None]) -> list[float] | None:
    if len(weights) == 1 or all(weight is None for weight in weights):
        return None
    return [1.0 if weight is None else weight for weight in weights]
