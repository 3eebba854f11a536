"""Attention that skips what the mask hides: a few queries at a time, over the keys they see.

It is our own CPU kernel's in float32, and torch's fused ones elsewhere.

Shape legend: B rows, T queries, K keys, Q queries of a piece, C keys that one of them sees, d and e widths of a head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fast_dllm.config import ContextAttention
from fast_dllm.masks import Tokens, dense_mask
from fast_dllm.model.kernels import why_no_kernels
from fast_dllm.training import attention_kernel

PIECE = 96
"""Queries of a piece: longer ones compute more scores that are hidden, shorter ones make more calls."""

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_Inputs = tuple[Tensor, Tensor, Tensor]
"""q [B, heads, Q, d], k [B, kv_heads, C, d] and v [B, kv_heads, C, e] of a piece."""


class Piece(NamedTuple):
    """Some queries, and what they see. The pieces of a sequence follow each other.

    Attributes:
        columns: int64 [C], the keys that a query of the piece sees in any row.
        mask: bool [B, 1, Q, C].
    """

    columns: Tensor
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
    for of_piece in zip(*(field.split(piece, dim=1) for field in tokens), strict=True):
        mask = dense_mask(Tokens(*of_piece), attention, keys=keys)
        columns = mask.any(dim=(0, 1, 2)).nonzero().flatten()
        pieces.append(Piece(columns, mask[..., columns]))
    return pieces


def attend(query: Tensor, key: Tensor, value: Tensor, pieces: Sequence[Piece], scale: float | None = None) -> Tensor:
    """Attention of each piece over its keys.

    Args:
        query: [B, heads, T, d].
        key: [B, kv_heads, K, d]; `kv_heads` divides `heads`.
        value: [B, kv_heads, K, e].
        pieces: of `cut`.
        scale: of the scores; None is 1 / sqrt(d).

    Returns:
        [B, heads, T, e].
    """
    columns, masks = [piece.columns for piece in pieces], [piece.mask for piece in pieces]
    out: Tensor
    out, _ = attend_in_pieces(query, key, value, columns, masks, scale)
    return out.transpose(1, 2)


@torch.library.custom_op("fast_dllm::attend_in_pieces", mutates_args=())
def attend_in_pieces(
    query: Tensor, key: Tensor, value: Tensor, columns: list[Tensor], masks: list[Tensor], scale: float | None
) -> tuple[Tensor, Tensor]:
    """`attend` as one operator, so that what recomputes layers can keep its result.

    Args:
        query: [B, heads, T, d].
        key: [B, kv_heads, K, d].
        value: [B, kv_heads, K, e].
        columns: of each piece.
        masks: of each piece.
        scale: of the scores.

    Returns:
        [B, T, heads, e], which models reshape next without a copy; and for the backward [B, T, heads], the logsumexp of
        each query's scores, or zeros where `F.scaled_dot_product_attention` has it to itself.
    """
    if _is_ours(query, key, value):
        return attention_kernel.attend(query, key, value, columns, masks, scale)
    parts = [
        _fused(queries, key.index_select(2, seen), value.index_select(2, seen), mask, scale)
        for queries, seen, mask in zip(_in_pieces(query, masks), columns, masks, strict=True)
    ]
    out, logsumexp = (torch.cat([part.transpose(1, 2) for part in kind], dim=1) for kind in zip(*parts, strict=True))
    return out, logsumexp


@attend_in_pieces.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, columns: list[Tensor], masks: list[Tensor], scale: float | None
) -> tuple[Tensor, Tensor]:
    rows, heads, length, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(rows, length, heads, value.shape[-1]), query.new_empty(rows, length, heads, dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.columns, ctx.masks, ctx.scale = inputs
    ctx.is_ours = _is_ours(query, key, value)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    query, key, value, out, logsumexp = ctx.saved_tensors
    no_list = [None] * len(ctx.masks)
    if ctx.is_ours:
        of_pieces = ctx.columns, ctx.masks, ctx.scale
        found = attention_kernel.attend_backward(gradient, query, key, value, out, logsumexp, *of_pieces)
        return *found, no_list, no_list, None
    d_query = torch.empty_like(query)
    # Many pieces see a key, and bfloat16 would round the sum of its gradients once for each.
    d_key = torch.zeros_like(key, dtype=torch.promote_types(key.dtype, torch.float32))
    d_value = torch.zeros_like(value, dtype=d_key.dtype)
    of_queries = (query, d_query, *(x.transpose(1, 2) for x in (gradient, out, logsumexp)))
    by_piece = zip(*(_in_pieces(x, ctx.masks) for x in of_queries), ctx.columns, ctx.masks, strict=True)
    for queries, d_queries, d_out, result, sums, seen, mask in by_piece:
        inputs = queries, key.index_select(2, seen), value.index_select(2, seen)
        found = _fused_backward(d_out, inputs, result, sums, mask, ctx.scale)
        d_queries.copy_(found[0])
        d_key.index_add_(2, seen, found[1].to(d_key.dtype))
        d_value.index_add_(2, seen, found[2].to(d_value.dtype))
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), no_list, no_list, None


attend_in_pieces.register_autograd(_backward, setup_context=_keep)
OPERATOR = torch.ops.fast_dllm.attend_in_pieces.default
"""As a dispatch mode sees it."""


def _is_ours(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether our kernel takes it. Not in bfloat16, for which torch's may have matrix units (AMX)."""
    return attention_kernel.takes(query, key, value) and why_no_kernels() is None


def _in_pieces(x: Tensor, masks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of [B, heads, T, ...], the queries of a piece each."""
    return tuple(x.split([mask.shape[2] for mask in masks], dim=2))


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """[B, heads, Q, e] of one piece, and the logsumexp [B, heads, Q] that only the kernel itself gives."""
    if _has_kernel(query, value):
        return _KERNEL(query, key, value, attn_mask=_added(mask, query), scale=scale)  # type: ignore[no-any-return]
    dtype = torch.promote_types(query.dtype, torch.float32)
    return _by_torch(query, key, value, mask, scale), query.new_zeros(*query.shape[:3], dtype=dtype)


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
    """Whether this is for the CPU's fused kernel: given what its forward found, its backward need not run that again.

    It takes one width of a head, and trusts its caller that a head's numbers lie side by side.
    """
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and query.stride(-1) == 1


def _groups_heads(device: torch.device) -> bool:
    """Whether fused attention takes a mask and fewer K/V heads than queries; else torch's math kernel keeps scores."""
    return device.type == "cpu"


def _added(mask: Tensor, query: Tensor) -> Tensor:
    """What the mask adds to scores."""
    return torch.where(mask, 0.0, -torch.inf).to(query.dtype)
