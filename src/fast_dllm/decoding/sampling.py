"""Logits to (token, confidence), each row by itself.

So nothing is added up by torch.sum or logsumexp: over a single row as long as a vocabulary they add in another order
than over several, and a token would hang on who is decoded beside it. softmax does not, and cumsum not on a CPU.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fast_dllm.config import ConfidenceMeasure


class SamplingParameters(NamedTuple):
    """One entry per candidate token (N).

    Attributes:
        temperature: [N], above 0.
        top_k: int64 [N], 0 keeps all.
        top_p: [N].
        uniform: [N], draws from U(0, 1).
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    uniform: Tensor


def greedy(logits: Tensor, banned: int | None, measure: ConfidenceMeasure) -> tuple[Tensor, Tensor]:
    """The likeliest token and the model's confidence in it.

    Args:
        logits: [N, V].
        banned: token that is never chosen (the mask token). Its probability stays in the denominator: the
            confidence is the model's, not flattered by what was taken away.
        measure: see `confidence_of`.

    Returns:
        tokens int64 [N], confidence [N].
    """
    token = (logits if banned is None else ban(logits, banned)).argmax(-1, keepdim=True)
    return token[:, 0], confidence_of(logits.softmax(-1), token, measure)


def sample(
    logits: Tensor, banned: int | None, measure: ConfidenceMeasure, parameters: SamplingParameters
) -> tuple[Tensor, Tensor]:
    """A token drawn from the truncated distribution, and its probability under that distribution.

    Drawn by inverse transform from one uniform number a token, so a row's draws do not depend on the batch.

    Args:
        logits: [N, V].
        banned: token that is never chosen.
        measure: see `confidence_of`.
        parameters: temperature, top-k, top-p and the draws.

    Returns:
        tokens int64 [N], confidence [N].
    """
    if banned is not None:
        logits = ban(logits, banned)
    ranked, order = (logits / parameters.temperature[:, None]).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    top_k = torch.where(parameters.top_k > 0, parameters.top_k, logits.shape[-1])
    ranked = ranked.masked_fill(rank >= top_k[:, None], -torch.inf)
    probability = ranked.softmax(-1)
    # A token is kept while the ones before it hold less than top_p: the first is always kept.
    before = _partial_sums(probability) - probability
    probability = ranked.masked_fill(before >= parameters.top_p[:, None], -torch.inf).softmax(-1)
    cumulative = _partial_sums(probability)
    # The last partial sum may round to less than a draw of almost 1; stay among the kept.
    drawn = torch.searchsorted(cumulative, parameters.uniform[:, None]).clamp(
        max=(probability > 0).sum(-1, keepdim=True) - 1
    )
    confidence = confidence_of(probability, drawn, measure)
    return order.gather(-1, drawn)[:, 0], confidence


def ban(logits: Tensor, token: int) -> Tensor:
    """The logits with one token at -inf."""
    allowed = logits.clone()
    allowed[..., token] = -torch.inf  # by a number: the host would wait for a tensor to reach the device
    return allowed


def confidence_of(probability: Tensor, token: Tensor, measure: ConfidenceMeasure) -> Tensor:
    """Confidence in a chosen token, in [0, 1] for "probability" and "entropy", [-1, 1] for "margin".

    Args:
        probability: [N, V].
        token: int64 [N, 1], the chosen one.
        measure: "probability" of the token; "margin" over the likeliest other; "entropy": 1 - H / log V.

    Returns:
        [N].
    """
    of_token = probability.gather(-1, token)[:, 0]
    if measure == "probability":
        return of_token
    if measure == "margin":
        return of_token - probability.scatter(-1, token, -1.0).amax(-1).clamp(min=0.0)
    entropy: Tensor = _partial_sums(torch.special.entr(probability))[:, -1]
    return 1 - entropy / math.log(probability.shape[-1])


def _partial_sums(values: Tensor) -> Tensor:
    """Of each row [N, V]."""
    if values.is_cuda and len(values) == 1:  # it would be scanned by another algorithm than several
        return values.expand(2, -1).cumsum(-1)[:1]
    return values.cumsum(-1)
