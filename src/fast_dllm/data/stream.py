"""Samples of data that does not fit into memory: read as they are trained, and again for every epoch."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from fast_dllm.data.build import Counts, nothing_to_learn
from fast_dllm.data.chat import Sample
from fast_dllm.data.rendering import render_documents
from fast_dllm.data.sources import BadRows, Document

_ONE_OF = 20
"""At most one document of so many is held out."""


class SampleStream:
    """Samples of documents that come one after another; nothing is held but what is held out.

    Held out are the first documents of the first epoch, as many as asked for, but no more than one of twenty where
    fewer than twenty times as many come at all. They are known by their places, and left out of every epoch.

    Attributes:
        held_out: samples that are not trained on.
    """

    def __init__(
        self,
        tokenizer: Any,
        documents: Callable[[int], Iterable[Document]],
        *,
        held_out: int,
        max_length: int,
        bad: BadRows,
        workers: int = 0,
    ) -> None:
        """Read what is held out.

        Args:
            tokenizer: the model's.
            documents: opens an epoch, counted from 0, such as `partial(stream_documents, ...)` with an `epoch`.
            held_out: documents to hold out, at most.
            max_length: longer conversations are cut, longer texts split.
            bad: told of every document that cannot be used, as the reader of `documents` is.
            workers: processes that render ahead of the training, as for `render_documents`.

        Raises:
            FastDLLMError: for bad data.
        """
        self._tokenizer, self._documents, self._max_length, self._bad = tokenizer, documents, max_length, bad
        self._workers = workers
        shown = islice(documents(0), _ONE_OF * held_out)
        first = list(islice(shown, held_out))
        chosen = first[: (len(first) + sum(1 for _ in shown)) // _ONE_OF]
        self._left_out = {document.place for document in chosen}
        self._of_held_out = Counts()
        self.held_out = list(self._of_held_out.usable(self._render(chosen)))
        self._counts = self._of_held_out

    def samples(self, epoch: int) -> Iterator[Sample]:
        """The samples of an epoch, each with a loss position; what is read in the first epoch is counted.

        Args:
            epoch: counted from 0.

        Raises:
            FastDLLMError: for bad data, or when there is nothing to learn from, while they are read.
        """
        counts, place = replace(self._of_held_out), None
        if epoch == 0:
            self._counts = counts

        def trained() -> Iterator[Document]:
            nonlocal place
            for document in self._documents(epoch):
                if document.place not in self._left_out:
                    place = place or document.place
                    yield document

        yield from counts.usable(self._render(trained(), self._workers))
        if counts.used == self._of_held_out.used:
            raise nothing_to_learn(place if counts.dropped else None, self._bad, self._max_length)

    def describe(self, max_length: int) -> str:
        """One line on what has been read of the first epoch, and on everything that was lost."""
        return self._counts.describe(len(self.held_out), self._bad.count, max_length)

    def _render(self, documents: Iterable[Document], workers: int = 0) -> Iterator[Sample]:
        return chain.from_iterable(
            render_documents(self._tokenizer, documents, max_length=self._max_length, bad=self._bad, workers=workers)
        )
