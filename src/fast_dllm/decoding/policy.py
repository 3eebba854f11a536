"""Which masked tokens a step reveals: a pure function over [rows, window]."""

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyParameters(NamedTuple):
    """One row of each per request, so that a batch may mix policies; every policy is a choice of these bounds.

    Attributes:
        threshold: [R, 1], reveal what is more confident than this ("threshold"); inf turns it off.
        at_least: int64 [R, 1], reveal this many of the most confident ("fixed"; 1 is "sequential"). None where no
            row asks for more than one.
        factor: [R, 1], reveal the largest n with (n+1)(1 - c(n)) < factor ("factor"); 0 turns it off. None where
            it is off in all rows.
    """

    threshold: Tensor
    at_least: Tensor | None = None
    factor: Tensor | None = None


def select(confidence: Tensor, masked: Tensor, parameters: PolicyParameters) -> Tensor:
    """Choose the tokens to reveal.

    The most confident masked token is always revealed, so that every step makes progress; on a tie the lowest
    position wins.

    Args:
        confidence: [R, W]; read at masked positions only.
        masked: bool [R, W]; a row with none reveals none.
        parameters: of each row's policy. "factor" is the bound of Theorem 1 (arXiv 2505.22618).

    Returns:
        bool [R, W], a subset of `masked`.
    """
    confidence = confidence.masked_fill(~masked, -torch.inf)
    chosen = (confidence > parameters.threshold).scatter(-1, confidence.argmax(dim=-1, keepdim=True), True)
    if parameters.at_least is not None or parameters.factor is not None:
        ranked, order = confidence.sort(dim=-1, descending=True, stable=True)
        n = torch.arange(1, confidence.shape[-1] + 1, device=confidence.device)
        rank_below = n <= (1 if parameters.at_least is None else parameters.at_least)
        if parameters.factor is not None:
            # As n grows so does the bound's left side: it holds up to the largest n, and fails behind.
            rank_below = rank_below | ((n + 1) * (1 - ranked) < parameters.factor)
        chosen |= torch.zeros_like(masked).scatter(-1, order, rank_below)
    return chosen & masked
