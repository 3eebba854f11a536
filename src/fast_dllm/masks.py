"""Who attends to whom: one predicate, and its dense, `flex_attention` and decoding forms.

Shape legend: B rows, T tokens of a training sequence.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fast_dllm.config import ContextAttention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

CLEAN = 0
"""Stream number of final tokens; noisy views are 1, 2, ..."""

NOWHERE = -1
"""Document number of padding: padding sees only padding, so its softmax stays finite and nobody reads it."""


class Tokens(NamedTuple):
    """What the predicate knows of each token; the four tensors broadcast with each other.

    Attributes:
        stream: `CLEAN`, or the number of the noisy view.
        block: number of the token's block in its row.
        place: in the row's order, for token-causal attention.
        document: which packed sample the token belongs to; `NOWHERE` for padding.
    """

    stream: Tensor
    block: Tensor
    place: Tensor
    document: Tensor


def visible(query: Tokens, key: Tokens, attention: ContextAttention) -> Tensor:
    """Whether a query sees a key, elementwise (METHOD table of arXiv 2509.26328, figure 2).

    | query | same noisy view | other view | clean                                 |
    |-------|-----------------|------------|---------------------------------------|
    | noisy | same block      | never      | strictly earlier blocks               |
    | clean | never           | never      | by `attention`: block, causal or full |

    Args:
        query: tokens that look.
        key: tokens that are looked at; broadcast against `query`.
        attention: who sees whom among clean tokens.

    Returns:
        bool, of the broadcast shape.
    """
    to_clean = key.stream == CLEAN
    earlier_block = key.block < query.block
    same_block = key.block == query.block
    if attention == "block":
        clean_to_clean = to_clean & (earlier_block | same_block)
    elif attention == "causal":
        clean_to_clean = to_clean & (key.place <= query.place)
    else:
        clean_to_clean = to_clean
    noisy_to_any = (to_clean & earlier_block) | ((key.stream == query.stream) & same_block)
    seen = torch.where(query.stream == CLEAN, clean_to_clean, noisy_to_any)
    return seen & (key.document == query.document)


def _at(tokens: Tokens, *index: Tensor | slice | None) -> Tokens:
    return Tokens(*(field[index] for field in tokens))


def dense_mask(tokens: Tokens, attention: ContextAttention, *, keys: Tokens | None = None) -> Tensor:
    """Mask of a training sequence over itself, or over other keys.

    Args:
        tokens: fields of shape [B, T].
        attention: who sees whom among clean tokens.
        keys: fields of shape [B, K]; None is the sequence itself.

    Returns:
        bool [B, 1, T, K], true where the query (third axis) sees the key (fourth).
    """
    every = slice(None)
    looked_at = _at(tokens if keys is None else keys, every, None, every)
    return visible(_at(tokens, every, every, None), looked_at, attention)[:, None]


def flex_mask(tokens: Tokens, attention: ContextAttention, *, keys: Tokens | None = None) -> "BlockMask":
    """The same mask for `torch.nn.attention.flex_attention` (GPU; its CPU kernel has no backward).

    Args:
        tokens: fields of shape [B, T].
        attention: who sees whom among clean tokens.
        keys: fields of shape [B, K]; None is the sequence itself.

    Returns:
        For B rows, broadcast over heads.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    looked_at = tokens if keys is None else keys

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(_at(tokens, b, q), _at(looked_at, b, k), attention)

    (rows, queries), device = tokens.stream.shape, tokens.stream.device
    return create_block_mask(mask_mod, rows, None, queries, looked_at.stream.shape[1], device=device)


def sequence_tokens(positions: Tensor, block_size: int) -> Tokens:
    """Clean tokens of unpadded, unpacked sequences.

    Args:
        positions: int64 [B, T], places in the sequence.
        block_size: D.
    """
    zero = torch.zeros_like(positions)
    return Tokens(stream=zero + CLEAN, block=positions // block_size, place=positions, document=zero)


def visible_ends(
    start: int, end: int, *, visible_end: int, noisy_from: int, block_size: int, attention: ContextAttention
) -> list[int]:
    """Who sees whom in a decoding forward over the cache: positions [start, end) see the keys before these ends.

    A slot holds final tokens before `noisy_from`, and one noisy block from there on. Under every context attention
    what a position sees of that is a prefix, so an end per position says it all.

    Args:
        start: first position that looks.
        end: end of the positions.
        visible_end: end of what the slot holds.
        noisy_from: where the noisy block starts; `visible_end` where there is none.
        block_size: D.
        attention: who sees whom among clean tokens.

    Returns:
        One end per position.
    """

    def clean_end(position: int) -> int:
        if attention == "causal":
            return position + 1
        return min((position // block_size + 1) * block_size, noisy_from) if attention == "block" else noisy_from

    return [clean_end(position) if position < noisy_from else visible_end for position in range(start, end)]
