"""Training attention: of the [T, T] scores of [view 1 | view 2 | clean] the mask shows about a sixth.

Dense attention computes them all. `flex_attention` skips them tile by tile, and is what a GPU gets. Its CPU kernel has
no backward, so elsewhere it is attention in pieces: by our own kernel on a CPU in float32, else by torch's.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fast_dllm.config import ContextAttention
from fast_dllm.masks import Tokens, flex_mask
from fast_dllm.model.forward import head_width
from fast_dllm.training.pieces import Piece, attend, cut

NAME = "fast_dllm_in_pieces"
"""What `config._attn_implementation` calls it."""

_TILED = ("cuda", "xpu")
"""Devices that run flex_attention, and its backward."""

_NARROWEST = 16
"""Width of a head that its kernels take."""

_flex_attention = torch.compile(flex_attention)
"""transformers' own repeats K and V for each query head where heads are no power of two, as Qwen2.5's."""

TrainingMask = Sequence[Piece] | BlockMask
"""Who sees whom, as the registered function needs it."""


def training_mask(
    tokens: Tokens, attention: ContextAttention, config: PretrainedConfig, *, keys: Tokens | None = None
) -> TrainingMask:
    """The mask of a training sequence, in the form that suits its device.

    Args:
        tokens: fields of shape [B, T].
        attention: who sees whom among clean tokens.
        config: of the model.
        keys: fields of shape [B, K]; None is the sequence itself.
    """
    if not _has_tiles(tokens.stream.device, config):
        return cut(tokens, attention, keys=keys)
    _let_flex_attention_compile()
    return flex_mask(tokens, attention, keys=keys)


def supports_pieces(model: PreTrainedModel) -> bool:
    """Whether the model runs torch's fused attention, and hands our arguments to what is registered in its place.

    A family that is loaded with another one (Gemma 2 caps its scores, gpt-oss has sinks) needs what pieces leave out.
    """
    is_fused = model.config._attn_implementation == "sdpa"
    return is_fused and bool(getattr(model, "_supports_attention_backend", False))


def _has_tiles(device: torch.device, config: PretrainedConfig) -> bool:
    return device.type in _TILED and head_width(config) >= _NARROWEST and find_spec("triton") is not None


def _let_flex_attention_compile() -> None:
    """Settings of the process, since a backward is compiled when it is first run."""
    settings = torch._dynamo.config
    # DDP would trace it inside the dispatch mode of what recomputes layers, for which its backward has no rule.
    settings.optimize_ddp = False
    # It is compiled for the first length, for any other, for numbers of rows, with and without gradients or a context.
    # Beyond the default limit (8) it would compute all scores, with a warning.
    settings.recompile_limit = max(settings.recompile_limit, 64)
    settings.fail_on_recompile_limit_hit = True


def _attention_of_transformers(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    training_mask: TrainingMask | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered function; without a training mask (decoding on the way, say) it is transformers' own.

    With one it drops out nothing, whatever the config of the model says.
    """
    if training_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)  # type: ignore[no-any-return]
    kind = query.device.type
    # Rotations may have left q and k in float32. Autocast does not know our operator, and flex_attention checks before.
    if torch.is_autocast_enabled(kind):
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if isinstance(training_mask, BlockMask):
        out = _flex_attention(query, key, value, block_mask=training_mask, scale=scaling, enable_gqa=True)
    else:
        out = attend(query, key, value, training_mask, scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _attention_of_transformers)
