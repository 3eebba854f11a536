"""The oracle: decoding one prompt without cache or batch, in plain loops, as the papers tell it.

Slow, and sharing no logic with the decode loop; tests hold that one to it token for token.

Shape legend: L positions, V vocabulary, N masked positions of a sub-block.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fast_dllm.config import BlockDiffusionConfig, ConfidenceMeasure, ContextAttention, DecodingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LogitsOf = Callable[[Tensor, int], Tensor]
"""(ids int64 [1, L], noisy_from) -> logits [L, V]: positions from `noisy_from` on are the noisy block."""


def hf_logits(model: "PreTrainedModel", attention: ContextAttention, block_size: int) -> LogitsOf:
    """The whole sequence through a transformers model, without a cache.

    Args:
        model: a `...ForCausalLM` in eval mode.
        attention: who sees whom among clean tokens.
        block_size: D of the request; ignored when `attention` is "full".
    """

    @torch.inference_mode()
    def logits_of(ids: Tensor, noisy_from: int) -> Tensor:
        place = torch.arange(ids.shape[1])
        query, key = place[:, None], place[None, :]
        if attention == "full":
            seen = torch.ones(len(place), len(place), dtype=torch.bool)
        elif attention == "causal":
            # Clean tokens see what came before; the noisy block sees that, and all of itself.
            seen = (key <= query) | (query >= noisy_from)
        else:
            seen = key // block_size <= query // block_size
        output = model(input_ids=ids, position_ids=place[None], attention_mask=seen[None, None], use_cache=False)
        logits: Tensor = output.logits[0]
        return logits

    return logits_of


def reference_generate(
    logits_of: LogitsOf,
    prompt: Sequence[int],
    config: BlockDiffusionConfig,
    decoding: DecodingConfig,
    stop_token_ids: Sequence[int] = (),
) -> list[int]:
    """Decode one prompt (arXiv 2509.26328 section 4; Algorithm 1 of arXiv 2505.22618 for full attention).

    Args:
        logits_of: the model, under the request's block size.
        prompt: token ids.
        config: what the checkpoint is.
        decoding: what is asked; `sub_block_cache` must be "none".
        stop_token_ids: used unless `decoding` names its own.

    Returns:
        The new tokens, the stop token included.
    """
    limit = len(prompt) + decoding.max_new_tokens
    block_size, sub_size = decoding.layout(config, limit)
    stops = set(stop_token_ids if decoding.stop_token_ids is None else decoding.stop_token_ids)
    # A position's token is sampled by the same draw at each look: random numbers belong to positions.
    source = random.Random(decoding.seed)
    draws = [source.random() for _ in range(limit + block_size)]
    sequence: list[int | None] = list(prompt)

    def ended() -> list[int] | None:
        return _final_answer(sequence, len(prompt), limit, stops)

    full = config.context_attention == "full"
    block_start = 0 if full else len(prompt) // block_size * block_size
    fused = decoding.fused_commit and block_size > 1
    while True:
        if config.token_shift and 0 < block_start == len(sequence) and not fused:
            # The last clean position predicts the first token of the block.
            logits = logits_of(torch.tensor([sequence]), block_start)[-1:]
            draw = draws[len(sequence) - len(prompt)]
            sequence.append(_choose(logits, config, decoding, [draw])[0][0])
            if (answer := ended()) is not None:
                return answer
        block_end = block_start + block_size
        sequence += [None] * (block_end - len(sequence))
        sub_starts = range(len(prompt) if full else block_start, block_end, sub_size)
        for sub_start in sub_starts:
            while masked := [i for i in range(sub_start, min(sub_start + sub_size, block_end)) if sequence[i] is None]:
                ids = [config.mask_token_id if token is None else token for token in sequence]
                logits = logits_of(torch.tensor([ids]), block_start)
                read = [i - 1 if config.token_shift else i for i in masked]
                tokens, confidences = _choose(logits[read], config, decoding, [draws[i - len(prompt)] for i in masked])
                if fused and config.token_shift and masked[0] == block_start:
                    # The first look at a block, in the forward that commits the one before it.
                    revealed = [0, *(1 + rest for rest in _reveal(confidences[1:], config, decoding))]
                else:
                    revealed = _reveal(confidences, config, decoding)
                for chosen in revealed:
                    sequence[masked[chosen]] = tokens[chosen]
                if (answer := ended()) is not None:
                    return answer
        block_start = block_end


def _final_answer(sequence: list[int | None], prompt_length: int, limit: int, stops: set[int]) -> list[int] | None:
    """The answer, if no mask stands before its stop token or its limit."""
    answer: list[int] = []
    for token in sequence[prompt_length:limit]:
        if token is None:
            return None
        answer.append(token)
        if token in stops:
            return answer
    return answer if prompt_length + len(answer) == limit else None


def _choose(
    logits: Tensor, config: BlockDiffusionConfig, decoding: DecodingConfig, uniform: Sequence[float]
) -> tuple[list[int], list[float]]:
    """Token and confidence of each row of logits [N, V]."""
    tokens, confidences = [], []
    for row, draw in zip(logits, uniform, strict=True):
        if decoding.temperature > 0:
            token, distribution = _sampled(row.tolist(), draw, config.mask_token_id, decoding)
        else:
            distribution = torch.softmax(row, dim=-1).tolist()
            token = _likeliest(distribution, config.mask_token_id)
        tokens.append(token)
        confidences.append(_confidence(distribution, token, decoding.confidence))
    return tokens, confidences


def _likeliest(distribution: list[float], banned: int | None) -> int:
    allowed = [token for token in range(len(distribution)) if token != banned]
    return max(allowed, key=lambda token: (distribution[token], -token))


def _sampled(logits: list[float], draw: float, banned: int | None, decoding: DecodingConfig) -> tuple[int, list[float]]:
    """A token by inverse transform over the descending distribution, and that distribution by token."""
    order = sorted((t for t in range(len(logits)) if t != banned), key=lambda t: (-logits[t], t))
    weights = [math.exp((logits[t] - logits[order[0]]) / decoding.temperature) for t in order]
    if decoding.top_k > 0:
        weights = weights[: decoding.top_k]
    total = sum(weights)
    kept, mass = [], 0.0
    for weight in weights:
        # The nucleus: tokens until they hold top_p, the one that crosses it included.
        if mass >= decoding.top_p * total:
            break
        kept.append(weight)
        mass += weight
    distribution = [0.0] * len(logits)
    for token, weight in zip(order, kept, strict=False):
        distribution[token] = weight / mass
    reached = 0.0
    for token in order[: len(kept)]:
        reached += distribution[token]
        if reached >= draw:
            return token, distribution
    return order[len(kept) - 1], distribution


def _confidence(distribution: list[float], token: int, measure: ConfidenceMeasure) -> float:
    if measure == "probability":
        return distribution[token]
    if measure == "margin":
        return distribution[token] - max(p for other, p in enumerate(distribution) if other != token)
    entropy = -sum(p * math.log(p) for p in distribution if p > 0)
    return 1 - entropy / math.log(len(distribution))


def _reveal(confidences: list[float], config: BlockDiffusionConfig, decoding: DecodingConfig) -> list[int]:
    """Which of the masked positions a step reveals; always the most confident one, the lowest on a tie."""
    ranking = sorted(range(len(confidences)), key=lambda i: (-confidences[i], i))
    if decoding.policy == "threshold":
        return [i for i in ranking if i == ranking[0] or confidences[i] > decoding.threshold_on(config)]
    count = 1
    if decoding.policy == "fixed":
        count = decoding.tokens_per_step
    elif decoding.policy == "factor":
        for n, i in enumerate(ranking, start=1):
            if (n + 1) * (1 - confidences[i]) < decoding.factor:
                count = n
    return ranking[:count]
