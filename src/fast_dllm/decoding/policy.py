"""Which masked tokens a step reveals: a pure function over [rows, window]."""

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyParameters(NamedTuple):
    """One row of each per request, so that a batch may mix policies; every policy is a choice of these bounds.

    Attributes:
        threshold: [R, 1], reveal what is more confident than this ("threshold"); inf turns it off.
        at_least: int64 [R, 1], reveal this many of the most confident ("fixed"; 1 is "sequential").
        factor: [R, 1], reveal the largest n with (n+1)(1 - c(n)) < factor ("factor"); 0 turns it off.
    """

    threshold: Tensor
    at_least: Tensor
    factor: Tensor


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
    ranked, order = confidence.sort(dim=-1, descending=True, stable=True)
    n = torch.arange(1, confidence.shape[-1] + 1, device=confidence.device)
    within_bound = (n + 1) * (1 - ranked) < parameters.factor
    # As n grows so does the bound's left side: the largest n is where the run of true ends.
    largest = (within_bound * n).amax(dim=-1, keepdim=True)
    rank_below = n <= torch.maximum(largest, parameters.at_least).clamp(min=1)
    chosen = torch.zeros_like(masked).scatter(-1, order, rank_below) | (confidence > parameters.threshold)
    return chosen & masked
