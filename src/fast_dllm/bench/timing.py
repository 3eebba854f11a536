"""Fair clocks: contestants take turns within every repetition."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")

WARM_UP = -1
"""The number of the repetition that is not counted."""

WARM_UP_TOKENS = 16
"""New tokens at most that a decoder warms up with."""

WARM_UP_PROMPT = 64
"""Prompt tokens at most that a decoder warms up with."""

# Worker threads spin for some milliseconds after their work. The next contestant's are not to compete with them.
PAUSE_S = 0.01


@dataclass(frozen=True)
class Timed(Generic[Result]):
    """One call.

    Attributes:
        seconds: wall time.
        result: what it returned.
    """

    seconds: float
    result: Result


def alternate(
    contestants: Mapping[Key, Callable[[int], Result]],
    repetitions: int,
    *,
    on_call: Callable[[], None] | None = None,
    pause_s: float = PAUSE_S,
) -> dict[Key, list[Timed[Result]]]:
    """Let contestants take turns: every one once in each repetition, the first another each time.

    Whatever drifts meanwhile (clock rate, other programs) meets all of them alike, so that values of the same
    repetition can be compared as pairs.

    Args:
        contestants: each is called with the number of the repetition, and first once with `WARM_UP`, which is
            not counted.
        repetitions: 1 or more.
        on_call: called after each call, those that warm up included.
        pause_s: rest before each call, in seconds.

    Returns:
        Of every contestant, its calls in order of the repetitions.
    """
    keys = list(contestants)
    timed: dict[Key, list[Timed[Result]]] = {key: [] for key in keys}
    for repetition in range(WARM_UP, repetitions):
        turn = max(repetition, 0) % max(len(keys), 1)
        for key in keys[turn:] + keys[:turn]:
            time.sleep(pause_s)
            start = time.perf_counter()
            result = contestants[key](repetition)
            seconds = time.perf_counter() - start
            if repetition != WARM_UP:
                timed[key].append(Timed(seconds, result))
            if on_call is not None:
                on_call()
    return timed


def paired_ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """`over` / `under` within each repetition.

    Args:
        over: values in order of the repetitions.
        under: as many.
    """
    return [a / b for a, b in zip(over, under, strict=True)]
