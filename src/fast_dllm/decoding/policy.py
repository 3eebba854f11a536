"""Which masked tokens a step reveals: a pure function over [rows, window].

On the host, where confidences go in any case: so few numbers are decided sooner than a device starts one kernel.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Flags = NDArray[np.bool_]


class PolicyParameters(NamedTuple):
    """One row of each per request, so that a batch may mix policies; every policy is a choice of these bounds.

    Attributes:
        threshold: [R, 1], reveal what is more confident than this ("threshold"); inf turns it off.
        at_least: integers [R, 1], reveal this many of the most confident ("fixed"; 1 is "sequential"). None where no
            row asks for more than one.
        factor: [R, 1], reveal the largest n with (n+1)(1 - c(n)) < factor ("factor"); 0 turns it off. None where
            it is off in all rows.
    """

    threshold: Floats
    at_least: NDArray[np.integer] | None = None
    factor: Floats | None = None


def select(confidence: Floats, masked: Flags, parameters: PolicyParameters) -> Flags:
    """Choose the tokens to reveal.

    The most confident masked token is always revealed, so that every step makes progress; on a tie the lowest
    position wins.

    Args:
        confidence: [R, W]; read at masked positions only.
        masked: [R, W]; a row with none reveals none.
        parameters: of each row's policy. "factor" is the bound of Theorem 1 (arXiv 2505.22618).

    Returns:
        [R, W], a subset of `masked`.
    """
    confidence = np.where(masked, confidence, -np.inf)
    row = np.arange(len(confidence))
    chosen = confidence > parameters.threshold
    chosen[row, confidence.argmax(-1)] = True
    if parameters.at_least is not None or parameters.factor is not None:
        order = np.argsort(-confidence, axis=-1, kind="stable")
        ranked = confidence[row[:, None], order]
        n = np.arange(1, confidence.shape[-1] + 1)
        rank_below = np.broadcast_to(n <= (1 if parameters.at_least is None else parameters.at_least), order.shape)
        if parameters.factor is not None:
            # As n grows so does the bound's left side: it holds up to the largest n, and fails behind.
            rank_below = rank_below | ((n + 1) * (1 - ranked) < parameters.factor)
        chosen[np.nonzero(rank_below)[0], order[rank_below]] = True
    return chosen & masked
