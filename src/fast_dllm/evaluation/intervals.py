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
    """Difference of two shares on the same questions, with the interval of the mean of the per-question differences.

    Where no pair differs that interval would have no width, however few there are. Its ends are then the largest share
    of questions that may differ without any of these showing it, in 1 of 40 samples.

    Args:
        right: per question, at least one.
        baseline: of the other contestant, in the same order.
    """
    differences = [int(a) - int(b) for a, b in zip(right, baseline, strict=True)]
    count = len(differences)
    mean = sum(differences) / count
    if count == 1:
        return Interval(mean, -1.0, 1.0)  # one pair says nothing of the others
    if not any(differences):
        most = 1 - 0.025 ** (1 / count)
        return Interval(mean, -most, most)
    variance = sum((difference - mean) ** 2 for difference in differences) / (count - 1)
    half = _Z * math.sqrt(variance / count)
    return Interval(mean, mean - half, mean + half)
