"""The training objective: lay the streams out for one forward, and score the loss positions.

Shape legend: B rows, L tokens a row, V noisy views, T tokens of the laid-out row, N scored tokens, H width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.masks import CLEAN, NOWHERE, Tokens

CHUNK = 512
"""Targets whose logits are held at a time."""


class Streams(NamedTuple):
    """[view 1 | view 2 | clean], less what no loss depends on, ready for one forward.

    Attributes:
        input_ids: int64 [B, T].
        position_ids: int64 [B, T]; a token has the same position in every stream.
        tokens: fields [B, T], for `masks.dense_mask` or `masks.flex_mask`.
        read: int64 [N, 2], (row, column) of the hidden state that predicts each target.
        targets: int64 [N].
        is_ar: bool [N], true where the target belongs to the autoregressive loss on the clean stream.
        origin: int64 [N, 3], (view, row, place in the row) of each target; the view of the clean stream is V.
    """

    input_ids: Tensor
    position_ids: Tensor
    tokens: Tokens
    read: Tensor
    targets: Tensor
    is_ar: Tensor
    origin: Tensor


def lay_out(
    input_ids: Tensor,
    loss_mask: Tensor,
    views: Tensor,
    config: BlockDiffusionConfig,
    *,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    with_ar: bool = False,
) -> Streams:
    """Lay noisy views and the clean stream out as one row per sample or pack.

    The published code runs each view beside a clean stream of its own (4L tokens); the clean stream is the same,
    and the views do not see each other, so [view 1 | view 2 | clean] gives the same numbers. A noisy block at
    which no loss is read, and a clean block that no kept token sees, are left out.

    Args:
        input_ids: int64 [B, L]; L a multiple of `config.block_size`.
        loss_mask: bool [B, L], response tokens.
        views: bool [V, B, L], tokens hidden in each view (`noise.draw_views`); V may be 0 for AR training.
        config: block size, mask token, shift and context attention.
        position_ids: int64 [B, L]; None counts from 0 in each row.
        document_ids: int [B, L], which packed sample each token belongs to, `NOWHERE` for padding; None is one.
        with_ar: also score the clean stream autoregressively (needs causal context attention).
    """
    rows, length = input_ids.shape
    index = torch.arange(length, device=input_ids.device).expand(rows, length)
    document = torch.zeros_like(index) if document_ids is None else document_ids.long()
    position = index if position_ids is None else position_ids
    shift = 1 if config.token_shift else 0

    predictable = loss_mask.clone()
    if shift:
        predictable[:, 0] = False
        predictable[:, 1:] &= document[:, 1:] == document[:, :-1]
    scored = torch.cat([views & predictable, (predictable if with_ar else torch.zeros_like(predictable))[None]])
    reads = torch.roll(scored, -shift, dims=-1)
    keep = _needed(reads, document, config.block_size, whole_blocks=config.context_attention != "causal")

    streams = [*range(1, len(views) + 1), CLEAN]
    mask_id = cast(int, config.mask_token_id)
    ids = torch.cat([input_ids.masked_fill(view, mask_id) for view in views] + [input_ids], dim=1)
    block = index // config.block_size
    stream = torch.tensor(streams, device=ids.device).repeat_interleave(length).expand(rows, -1)
    fields = [field.repeat(1, len(streams)) for field in (position, block, index, document)]

    flat_keep = keep.transpose(0, 1).reshape(rows, -1)
    position, *of_stream = fields
    ids, position, tokens = select(flat_keep, ids, position, Tokens(stream, *of_stream))

    rank = flat_keep.cumsum(1) - 1
    origin = scored.nonzero()
    which, row, place = origin.unbind(1)
    read = torch.stack([row, rank[row, which * length + place - shift]], dim=1)
    return Streams(ids, position, tokens, read, input_ids[row, place], which == len(views), origin)


def select(wanted: Tensor, input_ids: Tensor, position_ids: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tokens]:
    """Some columns of every row, in their order; rows with fewer of them end in padding.

    Args:
        wanted: bool [B, T].
        input_ids: int64 [B, T].
        position_ids: int64 [B, T].
        tokens: fields [B, T].

    Returns:
        The same of the wanted columns, as wide as the row that has most of them; of none, a column of padding.
    """
    # Models cannot run rows without a token, and of parallel processes each must have a gradient of every weight.
    width = max(int(wanted.sum(1).max()), 1)
    # A stable sort moves the wanted columns to the front in their own order.
    column = torch.argsort(~wanted, dim=1, stable=True)[:, :width]
    padding = ~wanted.gather(1, column)
    ids, position, stream, block, place, document = (x.gather(1, column) for x in (input_ids, position_ids, *tokens))
    of_rows = Tokens(stream.masked_fill(padding, CLEAN), block, place, document.masked_fill(padding, NOWHERE))
    return ids, position, of_rows


def _needed(reads: Tensor, document: Tensor, block_size: int, *, whole_blocks: bool) -> Tensor:
    """Tokens some loss depends on.

    Args:
        reads: bool [V + 1, B, L], positions whose hidden state is read, the clean stream's last.
        document: int64 [B, L].
        block_size: D.
        whole_blocks: a clean token sees to the end of its block.

    Returns:
        bool [V + 1, B, L].
    """
    _, rows, length = reads.shape

    def to_whole_blocks(wanted: Tensor) -> Tensor:
        blocks: Tensor = wanted.unflatten(-1, (length // block_size, block_size))
        return blocks.any(-1).repeat_interleave(block_size, dim=-1)

    noisy = to_whole_blocks(reads[:-1])
    # Noisy blocks see the clean blocks before them: of each document, the clean tokens before its last noisy block.
    place = torch.arange(length, device=reads.device)
    last = torch.where(noisy.any(0), place // block_size * block_size - 1, -1)
    read_clean = to_whole_blocks(reads[-1]) if whole_blocks else reads[-1]
    last = torch.maximum(last, torch.where(read_clean, place, -1))
    reach = torch.zeros(rows, int(document.max()) + 2, dtype=last.dtype, device=last.device)
    reach = reach.fill_(-1).scatter_reduce(1, document + 1, last, reduce="amax")
    clean = (place <= reach.gather(1, document + 1)) & (document != NOWHERE)
    return torch.cat([noisy & (document != NOWHERE), clean[None]])


def token_losses(hidden: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], *, chunk: int = CHUNK) -> Tensor:
    """Cross-entropy of each target, without ever holding all logits.

    Each chunk's logits are dropped after the forward and recomputed in the backward, so memory does not grow
    with N times the vocabulary. The last chunk's are kept: the backward begins with them.

    Args:
        hidden: [N, H], hidden states that predict the targets.
        targets: int64 [N].
        head: hidden [n, H] -> logits [n, vocabulary], a tensor of their own, since they are overwritten.
        chunk: n, targets scored at a time.

    Returns:
        float32 [N].
    """

    def score(h: Tensor, t: Tensor) -> Tensor:
        return cast(Tensor, _CrossEntropy.apply(head(h).float(), t))  # type: ignore[no-untyped-call]

    *parts, last = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    losses = [checkpoint(score, h, t, use_reentrant=False) if h.requires_grad else score(h, t) for h, t in parts]
    return torch.cat([*losses, score(*last)])


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy [n] of logits [n, V], which it overwrites: torch's own makes three more tensors of their size.

    They must be nobody else's: autograd refuses the backward where an operation before has kept them.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        torch.log_softmax(logits, dim=-1, out=logits)
        ctx.save_for_backward(logits, targets)
        return -logits.gather(1, targets[:, None]).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        d_logits = logits.exp_()
        d_logits.scatter_add_(1, targets[:, None], -torch.ones_like(d_logits[:, :1]))
        return d_logits.mul_(gradient[:, None]), None
