"""What a measured share says of the true one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959964  # two-sided 95% of the normal distribution


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval.

    Attributes:
        value: the estimate.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float


def share(right: int, asked: int) -> Interval:
    """Share of right answers, with Wilson's interval, which stays inside [0, 1].

    Args:
        right: how many.
        asked: of how many, at least one.
    """
    p, z2 = right / asked, _Z * _Z
    middle = (p + z2 / (2 * asked)) / (1 + z2 / asked)
    half = _Z * math.sqrt(p * (1 - p) / asked + z2 / (4 * asked * asked)) / (1 + z2 / asked)
    # Rounding may leave the ends of certain shares a little inside.
    return Interval(p, min(max(middle - half, 0.0), p), max(min(middle + half, 1.0), p))


def paired_difference(right: Sequence[bool], baseline: Sequence[bool]) -> Interval:
    """Difference of two shares on the same questions, with the adjusted interval of Bonett and Price (2012).

    It counts one more question for either side, so that a few questions that were judged alike do not pass for proof
    that all would be.

    Args:
        right: per question, at least one.
        baseline: of the other contestant, in the same order.
    """
    pairs = list(zip(right, baseline, strict=True))
    won, lost = pairs.count((True, False)), pairs.count((False, True))
    asked = len(pairs) + 2
    more, fewer = (won + 1) / asked, (lost + 1) / asked
    middle = more - fewer
    half = _Z * math.sqrt((more + fewer - middle * middle) / asked)
    return Interval((won - lost) / len(pairs), max(middle - half, -1.0), min(middle + half, 1.0))
