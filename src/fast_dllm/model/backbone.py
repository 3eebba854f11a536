"""What the engine needs of a model, and nothing about how it is computed."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fast_dllm.cache import KVCache


@dataclass(frozen=True)
class ForwardBatch:
    """One forward over R rows of Q positions each.

    Attributes:
        input_ids: int64 [R, Q].
        positions: int64 [R, Q].
        slots: int64 [R], ascending.
        slot_range: the slots as a slice where they lie side by side, else None.
        visible_end: int64 [R], keys a row may look at end here.
        noisy_from: int64 [R], start of the row's noisy block; `visible_end` in a clean forward.
        block_size: int64 [R].
        keys: largest `visible_end`.
        read: int64 [N, 2], (row, column) of the hidden states whose logits are wanted.
    """

    input_ids: Tensor
    positions: Tensor
    slots: Tensor
    slot_range: slice | None
    visible_end: Tensor
    noisy_from: Tensor
    block_size: Tensor
    keys: int
    read: Tensor


class Backbone(Protocol):
    """A causal language model run over our cache."""

    max_length: int | None
    """Longest sequence the model can take, in tokens; None if it names none."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    def new_cache(self, slots: int, max_length: int) -> KVCache:
        """Allocate a slab for this model."""
        ...

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Run the rows, write their K/V, and return the wanted logits.

        Returns:
            float32 (or wider) [N, vocabulary].
        """
        ...
