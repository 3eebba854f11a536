"""Training attention that skips what the mask hides: a few queries at a time, over the keys that one of them sees.

Of the [T, T] scores of [view 1 | view 2 | clean] the mask shows about a sixth. Dense attention computes them all;
`flex_attention` skips them too, but its CPU kernel has no backward, so pieces of torch's own fused attention it is.

Shape legend: B rows, T tokens of the laid-out row, Q queries of a piece, K keys that they see, d width of a head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fast_dllm.config import ContextAttention
from fast_dllm.masks import Tokens, dense_mask

NAME = "fast_dllm_in_pieces"
"""What `config._attn_implementation` calls it."""

PIECE = 96
"""Queries of a piece: longer ones compute more scores that are hidden, shorter ones make more calls."""


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
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # a Function of our own is none that autocast knows
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    out: Tensor = _Attend.apply(query, key, value, pieces, scale)  # type: ignore[no-untyped-call]
    return out


def supports_pieces(model: PreTrainedModel) -> bool:
    """Whether the model runs torch's fused attention, and hands our arguments to what is registered in its place.

    A family that is loaded with another one (Gemma 2 caps its scores, gpt-oss has sinks) needs what pieces leave out.
    """
    is_fused = model.config._attn_implementation == "sdpa"
    return is_fused and bool(getattr(model, "_supports_attention_backend", False))


def _fused(query: Tensor, key: Tensor, value: Tensor, piece: Piece, scale: float | None) -> Tensor:
    share = query.shape[1] // key.shape[1]
    if share > 1 and not _groups_heads(query.device):
        key, value = (x.repeat_interleave(share, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=piece.mask, scale=scale, enable_gqa=True)


def _groups_heads(device: torch.device) -> bool:
    """Whether fused attention takes a mask and fewer K/V heads than queries; else torch's math kernel keeps scores."""
    return device.type == "cpu"


class _Attend(torch.autograd.Function):
    """Keeps q, k and v alone: scores are cheap to compute again, and gradients of k and v add up in place."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[Piece], scale: float | None
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.pieces, ctx.scale = pieces, scale  # type: ignore[attr-defined]
        parts = [
            _fused(query[:, :, p.start : p.end], key.index_select(2, p.keys), value.index_select(2, p.keys), p, scale)
            for p in pieces
        ]
        # Heads last but one, as the models reshape it next: no copy then.
        return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        d_query = torch.zeros_like(query)
        # A key is seen by many pieces, and bfloat16 would round the sum once for each.
        d_key, d_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        for piece in ctx.pieces:
            here = slice(piece.start, piece.end)
            inputs = (query[:, :, here], key.index_select(2, piece.keys), value.index_select(2, piece.keys))
            with torch.enable_grad():
                inputs = tuple(x.detach().requires_grad_() for x in inputs)
                out = _fused(*inputs, piece, ctx.scale)
            d_query[:, :, here], keys, values = torch.autograd.grad(out, inputs, gradients[0][:, :, here])
            d_key.index_add_(2, piece.keys, keys.float())
            d_value.index_add_(2, piece.keys, values.float())
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


def _attention_of_transformers(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    pieces: Sequence[Piece] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered function; without pieces (decoding on the way, say) it is transformers' own."""
    if pieces is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)  # type: ignore[no-any-return]
    return attend(query, key, value, pieces, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, _attention_of_transformers)
