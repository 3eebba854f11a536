"""Documents to samples, in this process or in others beside it."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

from fast_dllm.data.chat import Sample, render
from fast_dllm.data.rows import Content
from fast_dllm.data.sources import BadRows, Document
from fast_dllm.errors import FastDLLMError

_LOT = 64
"""Documents that are handed to a process at once."""

_AHEAD = 4
"""Lots that are under way for each process."""

Rendered = list[Sample] | FastDLLMError
"""The samples of a document, or why there are none."""


def render_documents(
    tokenizer: Any, documents: Iterable[Document], *, max_length: int, bad: BadRows, workers: int = 0
) -> Iterator[list[Sample]]:
    """The samples of each document, in the order of the documents.

    Args:
        tokenizer: the model's.
        documents: what to render; read no further ahead than 256 documents for each worker.
        max_length: longer conversations are cut, longer texts split.
        bad: told of every document that the chat template refuses; such a one has no samples.
        workers: processes that render beside this one; 0 renders here. The samples are the same. Processes are
            spawned: a script that asks for them needs `if __name__ == "__main__":`.

    Raises:
        FastDLLMError: as `bad` does, or when a process dies.
    """
    for document, rendered in _each(tokenizer, documents, max_length, workers):
        if isinstance(rendered, FastDLLMError):
            bad.add(document.place, rendered)
            rendered = []
        yield rendered


def _each(
    tokenizer: Any, documents: Iterable[Document], max_length: int, workers: int
) -> Iterator[tuple[Document, Rendered]]:
    if not workers:
        for document in documents:
            yield document, _render(tokenizer, document.content, max_length)
        return
    unread, under_way = iter(documents), deque[tuple[list[Document], Future[list[Rendered]]]]()
    # Spawned: nothing that this process computes with, threads and devices, is fit to be forked.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _Worker.begin, (tokenizer, max_length))
    try:
        while True:
            while len(under_way) < _AHEAD * workers and (lot := list(islice(unread, _LOT))):
                under_way.append((lot, pool.submit(_Worker.render, [document.content for document in lot])))
            if not under_way:
                return
            lot, future = under_way.popleft()
            yield from zip(lot, future.result(), strict=True)
    except BrokenProcessPool as error:
        raise FastDLLMError(
            "a process that renders data died, for want of memory perhaps; give fewer --data-workers"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _render(tokenizer: Any, content: Content, max_length: int) -> Rendered:
    try:
        return render(tokenizer, content, max_length=max_length)
    except FastDLLMError as error:
        return error


class _Worker:
    """What a process that renders holds: handed over once, not with every lot."""

    tokenizer: Any
    max_length: int

    @classmethod
    def begin(cls, tokenizer: Any, max_length: int) -> None:
        cls.tokenizer, cls.max_length = tokenizer, max_length
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
        # A parent that was killed tells nobody; its workers would wait for it for ever.
        threading.Thread(target=_end_with_parent, daemon=True).start()

    @classmethod
    def render(cls, contents: Sequence[Content]) -> list[Rendered]:
        return [_render(cls.tokenizer, content, cls.max_length) for content in contents]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
