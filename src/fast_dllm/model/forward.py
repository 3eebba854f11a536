"""One pass through any decoder-only Hugging Face model: hidden states under our mask, logits where wanted."""

from functools import cache as memoised
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def hidden_states(
    model: "PreTrainedModel",
    input_ids: Tensor,
    position_ids: Tensor,
    mask: Tensor | None,
    cache: Any = None,
    **of_attention: Any,
) -> Tensor:
    """Run the decoder below the LM head.

    Args:
        model: a transformers `...ForCausalLM`.
        input_ids: int64 [B, Q].
        position_ids: int64 [B, Q].
        mask: bool [B, 1, Q, K]; transformers takes a 4-D mask as it is, so no modeling code is forked. None for an
            attention function of our own that needs none.
        cache: a transformers cache, or None.
        **of_attention: what transformers hands on to that function.

    Returns:
        [B, Q, H], after the final norm.
    """
    if mask is not None and model.config._attn_implementation == "eager":
        # Eager attention adds the mask to the scores: a boolean one would be added as 0 and 1.
        mask = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    decoder = model.get_decoder()
    if cache is not None:
        of_attention[cache_argument(decoder.__class__)] = cache
    outputs = decoder(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask,
        use_cache=cache is not None,
        **of_attention,
    )
    return outputs.last_hidden_state  # type: ignore[no-any-return]


@memoised
def cache_argument(model: type[torch.nn.Module]) -> str:
    """What a model's forward calls its cache: transformers 5.24 renamed it, but not in code of a checkpoint's own.

    Args:
        model: class of a transformers model.
    """
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def head_width(config: "PretrainedConfig") -> int:
    """Numbers of one attention head's query; not all configs name it."""
    sizes = config.get_text_config()
    width: int = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
    return width


def head_logits(model: "PreTrainedModel", hidden: Tensor) -> Tensor:
    """LM head of the positions a caller wants, with the scaling some families put after it.

    Args:
        model: a transformers `...ForCausalLM`.
        hidden: [..., H].

    Returns:
        [..., vocabulary].
    """
    logits: Tensor = model.get_output_embeddings()(hidden)
    config = model.config
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits
