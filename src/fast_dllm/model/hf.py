"""Any decoder-only Hugging Face model, through its own modules, over our cache and under our masks."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from fast_dllm.cache import KVCache, LayerShape
from fast_dllm.config import ContextAttention
from fast_dllm.masks import decode_mask
from fast_dllm.model.backbone import ForwardBatch
from fast_dllm.model.forward import head_logits, hidden_states


class _SlabCache(Cache):  # type: ignore[misc]
    """The rows of one forward, in the shape of a transformers cache."""

    def __init__(self, cache: KVCache, batch: ForwardBatch) -> None:
        super().__init__(layers=[])
        self._cache = cache
        self._batch = batch
        self._rows = batch.slots if batch.slot_range is None else batch.slot_range

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write this forward's K/V in place; hand back all that the rows hold."""
        self._cache.write(layer_idx, self._batch.slots, self._batch.positions, key_states, value_states)
        return self._cache.read(layer_idx, self._rows, self._batch.keys)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held; models use it only to guess positions, which we always give."""
        return self._batch.keys


class _ShapeProbe(Cache):  # type: ignore[misc]
    """Learns each layer's K/V shape from one forward: true for every architecture, config keys are not."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, LayerShape] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Note the shape."""
        self.shapes[layer_idx] = LayerShape(key_states.shape[1], key_states.shape[-1], value_states.shape[-1])
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No tokens."""
        return 0


class HFBackbone:
    """`Backbone` over a transformers `...ForCausalLM`."""

    def __init__(self, model: PreTrainedModel, attention: ContextAttention, max_length: int | None = None) -> None:
        """Wrap a model.

        Args:
            model: in eval mode; not copied.
            attention: context attention of the checkpoint.
            max_length: longest sequence, in tokens.
        """
        self.model = model
        self.attention: ContextAttention = attention
        self.max_length = max_length
        self._layers = self._probe_layers()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _probe_layers(self) -> list[LayerShape]:
        zero = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        probe = _ShapeProbe()
        hidden_states(self.model, zero, zero, torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device), probe)
        return [probe.shapes[layer] for layer in sorted(probe.shapes)]

    def new_cache(self, slots: int, max_length: int) -> KVCache:
        """Allocate a slab: [slots, kv_heads, max_length, head_dim] per layer."""
        return KVCache(self._layers, slots, max_length, dtype=self.model.dtype, device=self.device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Run the rows (see `Backbone.forward`).

        Returns:
            [N, vocabulary], float32 or the model's dtype if wider.
        """
        mask = decode_mask(
            batch.positions, batch.visible_end, batch.noisy_from, batch.block_size, batch.keys, self.attention
        )
        hidden = hidden_states(self.model, batch.input_ids, batch.positions, mask, _SlabCache(cache, batch))
        logits = head_logits(self.model, hidden[batch.read[:, 0], batch.read[:, 1]])
        return logits if logits.dtype == torch.float64 else logits.float()
