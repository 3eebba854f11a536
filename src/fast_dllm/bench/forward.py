"""One bare forward over a cache that is already full: the one place here that builds a `ForwardBatch`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.cache import KVCache
from fast_dllm.model.backbone import ForwardBatch, RowSpan

_PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Context:
    """A model with some tokens in its cache.

    Attributes:
        lm: the model.
        cache: one slot, with room for the positions of a forward.
        length: tokens in it.
    """

    lm: BlockDiffusionLM
    cache: KVCache
    length: int

    def prepare(self, ids: list[int], *, head: bool) -> Callable[[int], None]:
        """A forward over positions that follow the context; run again, it overwrites what it wrote.

        Args:
            ids: token ids. One position runs as AR decoding does, several as a noisy block, which sees itself whole;
                where the model has a mask token they are masks.
            head: whether the logits of every position are wanted; of none otherwise.

        Returns:
            The forward; it takes a number and makes nothing of it.
        """
        start, end = self.length, self.length + len(ids)
        noisy_from = start if len(ids) > 1 else end
        mask = self.lm.config.mask_token_id
        if len(ids) > 1 and mask is not None:
            ids = [mask] * len(ids)
        row = RowSpan(slot=0, start=start, end=end, visible_end=end, noisy_from=noisy_from, block_size=len(ids))
        device = self.lm.backbone.device
        batch = ForwardBatch.build([row], ids, list(range(len(ids))) if head else [], device)

        def forward(_: int) -> None:
            self.lm.backbone.forward(batch, self.cache)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)

        return forward


def fill(lm: BlockDiffusionLM, ids: list[int], room: int) -> Context:
    """Run a prompt into a new cache.

    Args:
        lm: the model.
        ids: of the context.
        room: positions to keep for a forward behind it.
    """
    cache = lm.backbone.new_cache(1, len(ids) + room)
    for start in range(0, len(ids), _PREFILL_CHUNK):
        chunk = ids[start : start + _PREFILL_CHUNK]
        end = start + len(chunk)
        row = RowSpan(slot=0, start=start, end=end, visible_end=end, noisy_from=end, block_size=lm.config.block_size)
        lm.backbone.forward(ForwardBatch.build([row], chunk, [], lm.backbone.device), cache)
    return Context(lm, cache, len(ids))
