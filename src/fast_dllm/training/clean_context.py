"""The clean tokens' keys and values, computed first and looked at by the noisy ones."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from fast_dllm.masks import Tokens


class CleanContext(Cache):  # type: ignore[misc]
    """Holds the K/V of the first forward; every later one sees them beside its own, which are not kept."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._tokens: Tokens | None = None
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def with_keys(self, tokens: Tokens) -> Tokens:
        """What a forward over these tokens looks at: [B, K] of each field. Call it once for each forward, before it."""
        if self._tokens is None:
            self._tokens = tokens
            return tokens
        return Tokens(*(torch.cat(pair, dim=1) for pair in zip(self._tokens, tokens, strict=True)))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """K/V [B, heads, K, d] that this forward sees in a layer."""
        held = self._held.setdefault(layer_idx, (key_states, value_states))
        if held[0] is key_states:
            return held
        return torch.cat([held[0], key_states], dim=2), torch.cat([held[1], value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held; models use it only to guess positions, which we always give."""
        return 0 if layer_idx not in self._held else self._held[layer_idx][0].shape[2]
