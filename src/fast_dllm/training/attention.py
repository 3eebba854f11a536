"""Training attention that skips what the mask hides.

Of the [T, T] scores of [view 1 | view 2 | clean] the mask shows about a sixth. Dense attention computes them all;
`flex_attention` skips them tile by tile, and is what a GPU gets. Its CPU kernel has no backward, so elsewhere it is
pieces of torch's own fused attention: a few queries at a time, over the keys that one of them sees.

Shape legend: B rows, T tokens of the laid-out row, Q queries of a piece, K keys that they see, d width of a head.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fast_dllm.config import ContextAttention
from fast_dllm.masks import Tokens, dense_mask, flex_mask

NAME = "fast_dllm_in_pieces"
"""What `config._attn_implementation` calls it."""

PIECE = 96
"""Queries of a piece: longer ones compute more scores that are hidden, shorter ones make more calls."""

_TILED = ("cuda", "xpu")
"""Devices that run flex_attention, and its backward."""

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


_Inputs = tuple[Tensor, Tensor, Tensor]
"""q [B, heads, Q, d], k and v [B, kv_heads, K, d] of a piece."""


class Piece(NamedTuple):
    """Some queries, and what they see.

    Attributes:
        start: first query.
        end: end of the queries.
        keys: int64 [K], the columns that a query of the piece sees in any row.
        mask: bool [B, 1, Q, K].
    """

    start: int
    end: int
    keys: Tensor
    mask: Tensor


def cut(tokens: Tokens, attention: ContextAttention, *, keys: Tokens | None = None, piece: int = PIECE) -> list[Piece]:
    """Cut a training sequence into pieces.

    Args:
        tokens: fields of shape [B, T].
        attention: who sees whom among clean tokens.
        keys: fields of shape [B, K]; None is the sequence itself.
        piece: queries in each.
    """
    keys = tokens if keys is None else keys
    pieces = []
    for start in range(0, tokens.stream.shape[1], piece):
        end = min(start + piece, tokens.stream.shape[1])
        seen = dense_mask(Tokens(*(field[:, start:end] for field in tokens)), attention, keys=keys)
        columns = seen.any(dim=(0, 1, 2)).nonzero().flatten()
        pieces.append(Piece(start, end, columns, seen[..., columns]))
    return pieces


Sight = Sequence[Piece] | BlockMask


def sight(tokens: Tokens, attention: ContextAttention, *, keys: Tokens | None = None) -> Sight:
    """What the registered function needs to know, on the device of the tokens.

    Args:
        tokens: fields of shape [B, T].
        attention: who sees whom among clean tokens.
        keys: fields of shape [B, K]; None is the sequence itself.
    """
    has_tiles = tokens.stream.device.type in _TILED and find_spec("triton") is not None
    return (flex_mask if has_tiles else cut)(tokens, attention, keys=keys)


def attend(query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[Piece], scale: float | None = None) -> Tensor:
    """Attention of each piece over its keys.

    Args:
        query: [B, heads, T, d].
        key: [B, kv_heads, T, d]; `kv_heads` divides `heads`.
        value: [B, kv_heads, T, d].
        pieces: of `cut`.
        scale: of the scores; None is 1 / sqrt(d).

    Returns:
        [B, heads, T, d].
    """
    out: Tensor
    out, _ = attend_in_pieces(query, key, value, [p.keys for p in pieces], [p.mask for p in pieces], scale)
    return out.transpose(1, 2)


def supports_pieces(model: PreTrainedModel) -> bool:
    """Whether the model runs torch's fused attention, and hands our arguments to what is registered in its place.

    A family that is loaded with another one (Gemma 2 caps its scores, gpt-oss has sinks) needs what pieces leave out.
    """
    is_fused = model.config._attn_implementation == "sdpa"
    return is_fused and bool(getattr(model, "_supports_attention_backend", False))


@torch.library.custom_op("fast_dllm::attend_in_pieces", mutates_args=())
def attend_in_pieces(
    query: Tensor, key: Tensor, value: Tensor, keys: list[Tensor], masks: list[Tensor], scale: float | None
) -> tuple[Tensor, Tensor]:
    """`attend` as one operator, so that what recomputes layers can keep its result.

    Args:
        query: [B, heads, T, d].
        key: [B, kv_heads, T, d].
        value: [B, kv_heads, T, d].
        keys: int64 [K] of each piece.
        masks: bool [B, 1, Q, K] of each piece.
        scale: of the scores.

    Returns:
        [B, T, heads, d], which models reshape next without a copy, and for the backward float32 [B, T, heads]: the
        logsumexp of each query's scores, or nothing where only torch knows them.
    """
    parts = [
        _fused(queries, key.index_select(2, seen), value.index_select(2, seen), mask, scale)
        for queries, seen, mask in zip(_in_pieces(query, masks), keys, masks, strict=True)
    ]
    out, logsumexp = (torch.cat([part.transpose(1, 2) for part in kind], dim=1) for kind in zip(*parts, strict=True))
    return out, logsumexp


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.keys, ctx.masks, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    query, key, value, out, logsumexp = ctx.saved_tensors
    # Of keys and values in float32: many pieces see each, and bfloat16 would round the sum once for each piece.
    d_query, (d_key, d_value) = (
        torch.empty_like(query),
        (torch.zeros_like(x, dtype=torch.float32) for x in (key, value)),
    )
    of_queries = (query, d_query, *(x.transpose(1, 2) for x in (gradient, out, logsumexp)))
    by_piece = zip(*(_in_pieces(x, ctx.masks) for x in of_queries), ctx.keys, ctx.masks, strict=True)
    for queries, d_queries, d_out, result, sums, seen, mask in by_piece:
        inputs = queries, key.index_select(2, seen), value.index_select(2, seen)
        found = _fused_backward(d_out, inputs, result, sums, mask, ctx.scale)
        d_queries.copy_(found[0])
        d_key.index_add_(2, seen, found[1].float())
        d_value.index_add_(2, seen, found[2].float())
    no_list = [None] * len(ctx.masks)
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), no_list, no_list, None


attend_in_pieces.register_autograd(_backward, setup_context=_keep)
OPERATOR = torch.ops.fast_dllm.attend_in_pieces.default
"""As a dispatch mode sees it."""


def _in_pieces(x: Tensor, masks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of [B, heads, T, ...], the queries of a piece each."""
    return tuple(x.split([mask.shape[2] for mask in masks], dim=2))


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """[B, heads, Q, d] of one piece, and the logsumexp [B, heads, Q] that only the kernel itself gives."""
    if _has_kernel(query, value):
        return _KERNEL(query, key, value, attn_mask=_added(mask, query), scale=scale)  # type: ignore[no-any-return]
    return _by_torch(query, key, value, mask, scale), query.new_empty(*query.shape[:3], dtype=torch.float32)


def _fused_backward(
    gradient: Tensor, inputs: _Inputs, out: Tensor, logsumexp: Tensor, mask: Tensor, scale: float | None
) -> tuple[Tensor, ...]:
    query, _, value = inputs
    if _has_kernel(query, value):
        of_forward = (out, logsumexp, 0.0, False)
        return _KERNEL_BACKWARD(gradient, *inputs, *of_forward, attn_mask=_added(mask, query), scale=scale)  # type: ignore[no-any-return]
    with torch.enable_grad():
        query, key, value = (x.detach().requires_grad_() for x in inputs)
        again = _by_torch(query, key, value, mask, scale)
    return torch.autograd.grad(again, (query, key, value), gradient)


def _by_torch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    share = query.shape[1] // key.shape[1]
    if share > 1 and not _groups_heads(query.device):
        key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether the fused kernel is the CPU's: with what its forward found, its backward need not run that again."""
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def _groups_heads(device: torch.device) -> bool:
    """Whether fused attention takes a mask and fewer K/V heads than queries; else torch's math kernel keeps scores."""
    return device.type == "cpu"


def _added(mask: Tensor, query: Tensor) -> Tensor:
    """What the mask adds to scores."""
    return torch.where(mask, 0.0, -torch.inf).to(query.dtype)


def _attention_of_transformers(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    seen: Sight | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered function; without a sight (decoding on the way, say) it is transformers' own."""
    if seen is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)  # type: ignore[no-any-return]
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # which knows neither our operator nor flex_attention
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if isinstance(seen, BlockMask):
        return flex_attention_forward(module, query, key, value, seen, scaling=scaling)  # type: ignore[no-any-return]
    return attend(query, key, value, seen, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, _attention_of_transformers)
