"""Several sources as one: weighted draws and a shuffle buffer, both pure functions of the seed.

Not `datasets.interleave_datasets`: it wants one schema of columns for all sources, and its rows have lost the file and
line they came from.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

_Row = TypeVar("_Row")
_END = object()


def mix(
    sources: Sequence[Callable[[], Iterable[_Row]]], weights: Sequence[float] | None = None, *, seed: int | str
) -> Iterator[_Row]:
    """Draw rows from several sources, each in its own order, until every source has been given once, whole.

    Args:
        sources: each opens a source that has rows, anew with every call.
        weights: relative shares. A source that is through begins again, so that the shares hold to the end. None
            gives each row once: among the sources that are not through, one is as likely as another.
        seed: of the draws.
    """
    rng = random.Random(f"mix-{seed}")
    rows = [iter(source()) for source in sources]
    ahead: list[object] = [next(row, _END) for row in rows]
    shares = [1.0] * len(rows) if weights is None else list(weights)
    unseen = {index for index, row in enumerate(ahead) if row is not _END}
    while unseen:
        [index] = rng.choices(range(len(rows)), shares)
        if ahead[index] is _END and weights is None:
            shares[index] = 0.0
            continue
        if ahead[index] is _END:
            rows[index] = iter(sources[index]())
            ahead[index] = next(rows[index])
        yield ahead[index]  # type: ignore[misc]
        ahead[index] = next(rows[index], _END)
        if ahead[index] is _END:
            unseen.discard(index)


def shuffled(rows: Iterable[_Row], buffer_size: int, *, seed: int | str) -> Iterator[_Row]:
    """Rows in a random order, with only some of them held.

    Args:
        rows: as they come.
        buffer_size: rows to choose the next one from.
        seed: of the choices.
    """
    rng = random.Random(f"shuffle-{seed}")
    held: list[_Row] = []
    for row in rows:
        if len(held) < buffer_size:
            held.append(row)
            continue
        index = rng.randrange(buffer_size)
        yield held[index]
        held[index] = row
    rng.shuffle(held)
    yield from held
