"""How likely an autoregressive model takes a given text to be."""

from collections.abc import Sequence

import torch

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.decoding.sampling import ban
from fast_dllm.errors import FastDLLMError
from fast_dllm.model.backbone import ForwardBatch, RowSpan


def has_likelihood(config: BlockDiffusionConfig) -> bool:
    """Whether a model's clean stream is autoregressive, so that one forward says P(token | tokens before) of each."""
    return config.token_shift and (config.context_attention == "causal" or config.block_size == 1)


@torch.inference_mode()
def log_likelihood(lm: BlockDiffusionLM, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
    """Log-probability of a continuation, from one forward over context and continuation.

    Args:
        lm: the model.
        context: token ids, at least one; as many of the last ones as the model has positions for are used.
        continuation: token ids, no more than those positions.

    Returns:
        The natural logarithm of its probability, and whether greedy AR decoding gives it.

    Raises:
        FastDLLMError: for a model that has no such probability.
    """
    if not has_likelihood(lm.config):
        raise FastDLLMError(
            "this model has no likelihood of a text: only one with token shift and causal context attention is "
            "autoregressive, or one that is not adapted"
        )
    ids = [*context, *continuation][:-1]
    if lm.backbone.max_length is not None:
        ids = ids[-lm.backbone.max_length :]
    length = len(ids)
    row = RowSpan(slot=0, start=0, end=length, visible_end=length, noisy_from=length, block_size=1)
    read = range(length - len(continuation), length)
    batch = ForwardBatch.build([row], ids, read, lm.backbone.device)
    logits = lm.backbone.forward(batch, lm.backbone.new_cache(1, length))
    targets = torch.tensor(continuation, device=logits.device)
    chosen = logits.log_softmax(-1).gather(1, targets[:, None])
    allowed = logits if lm.config.mask_token_id is None else ban(logits, lm.config.mask_token_id)
    return float(chosen.sum()), bool((allowed.argmax(-1) == targets).all())
