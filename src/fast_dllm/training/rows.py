"""Samples to the rows that are trained: all at once, or as they come."""

import hashlib
import random
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, compress, islice

from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.data.chat import Sample
from fast_dllm.data.packing import Packed, first_fit, pack
from fast_dllm.errors import FastDLLMError
from fast_dllm.training.options import AdaptOptions
from fast_dllm.training.schedule import NOTHING_TO_LEARN, WINDOW, in_order, shuffles

Epochs = Callable[[int], Iterable[Sample]]
"""The samples of an epoch, counted from 0, in the order they are to be read; every call reads them anew."""

_TOLD_BY = 64
"""Samples at the beginning of a stream that tell it from another."""


def digest_of(samples: Sequence[Sample] | Epochs) -> tuple[str, Sequence[Sample] | Epochs]:
    """What tells the data of one run from that of another.

    It is a hash of what is learned: of all samples, or of the first ones of a stream. The prompts are not in it, since
    some chat templates write the day's date there, and a run may go on tomorrow.

    Returns:
        The digest, and the samples to train on. A stream's first epoch goes on where the digest stopped reading it.
    """
    if not callable(samples):
        return _digest(samples), samples
    rest = iter(samples(0))
    first = list(islice(rest, _TOLD_BY))
    opened = [chain(first, rest)]
    return _digest(first), lambda epoch: opened.pop() if opened and epoch == 0 else samples(epoch)


def _digest(samples: Iterable[Sample]) -> str:
    found = hashlib.sha256()
    for sample in samples:
        learned = array("q", compress(sample.input_ids, sample.loss_mask))
        found.update(len(learned).to_bytes(8, "little") + learned.tobytes())
    return found.hexdigest()[:32]


def no_longer_than(
    samples: Sequence[Sample] | Epochs, positions: int | None, options: AdaptOptions
) -> Sequence[Sample] | Epochs:
    """The samples, of which none is longer than what the model will decode.

    Args:
        samples: to train on.
        positions: of the model (`Checkpoint.max_length`); None for no limit.
        options: of the run.

    Raises:
        FastDLLMError: for one that is, or a row whose samples are read as one; of `Epochs`, when it is read.
    """
    if positions is None:
        return samples
    most = positions

    def check(tokens: int, what: str) -> None:
        if tokens > most:
            remedy = f"give --max-length {most // options.block_size * options.block_size}"
            raise FastDLLMError(f"{what} has {tokens} tokens, and the model {most} positions; {remedy}")

    def checked(read: Iterable[Sample]) -> Iterator[Sample]:
        for sample in read:
            check(len(sample.input_ids), "a sample")
            yield sample

    if options.pack and not options.separate_documents:
        check(options.max_length, "a row")
    return (lambda epoch: checked(samples(epoch))) if callable(samples) else list(checked(samples))


def open_run(
    samples: Sequence[Sample] | Epochs, config: BlockDiffusionConfig, options: AdaptOptions, batch: int
) -> Callable[[], Iterator[Packed]]:
    """What begins a run: the rows in the order they are trained, without end.

    Args:
        samples: to train on. Of `Epochs` one window of rows is held, and with `options.pack` no more than that to be
            packed together.
        config: of the model being trained.
        options: of the run.
        batch: the global batch.

    Raises:
        FastDLLMError: when there is nothing to learn from; of `Epochs`, while they are read.
    """
    epochs = _epochs(samples, config, options, batch)
    return lambda: in_order(epochs, _length, batch, options.seed)


def _epochs(
    samples: Sequence[Sample] | Epochs, config: BlockDiffusionConfig, options: AdaptOptions, batch: int
) -> Callable[[int, random.Random], Iterable[Packed]]:
    if not callable(samples):
        return shuffles(rows_of(samples, config, options))
    return lambda number, _: lay_rows(samples(number), config, options, window=WINDOW * batch)


def rows_of(samples: Iterable[Sample], config: BlockDiffusionConfig, options: AdaptOptions) -> list[Packed]:
    """All rows of some samples.

    Raises:
        FastDLLMError: when there is nothing to learn from.
    """
    samples = list(samples)
    if options.pack:
        rows = list(lay_rows(samples, config, options))
    else:  # one that is drawn often, by its source's weight, is laid once
        laid = {key: list(lay_rows([sample], config, options)) for key, sample in {id(s): s for s in samples}.items()}
        rows = [row for sample in samples for row in laid[id(sample)]]
    if not rows:
        raise FastDLLMError(NOTHING_TO_LEARN)
    return rows


def lay_rows(
    samples: Iterable[Sample], config: BlockDiffusionConfig, options: AdaptOptions, *, window: int = sys.maxsize
) -> Iterator[Packed]:
    """Lay samples into rows, each into one of its own, or packed.

    Args:
        samples: one without a response token is left out.
        config: of the model being trained.
        options: of the run.
        window: rows whose samples are held to be packed together.
    """
    trainable = (sample for sample in samples if any(sample.loss_mask))
    lots = _lots(trainable, options, window) if options.pack else ([sample] for sample in trainable)
    for lot in lots:
        yield from pack(
            lot,
            length=options.max_length,
            block_size=config.block_size,
            pad_id=config.mask_token_id or 0,
            pad_blocks=options.pad_to_block,
            separate=options.separate_documents,
        )


def _lots(samples: Iterator[Sample], options: AdaptOptions, window: int) -> Iterator[list[Sample]]:
    """The samples of one row each, by first fit among as many as would fill a window; its full rows come at once."""
    block = options.block_size if options.pad_to_block else 1

    def size(sample: Sample) -> int:
        return -(-len(sample.input_ids) // block) * block

    held: list[Sample] = []
    while True:
        tokens = sum(map(size, held))
        while tokens < window * options.max_length and (sample := next(samples, None)) is not None:
            held.append(sample)
            tokens += size(sample)
        if not held:
            return
        fits = first_fit([size(sample) for sample in held], options.max_length)
        lots = deque([held[index] for index in fit] for fit in fits[:window])
        held = [held[index] for fit in fits[window:] for index in fit]  # with room left, for what comes next
        while lots:
            yield lots.popleft()


def _length(row: Packed) -> int:
    return len(row.input_ids)
