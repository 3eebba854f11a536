"""Any decoder-only Hugging Face model, through its own modules, over our cache and under our masks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from fast_dllm.cache import LayerShape, SlabCache
from fast_dllm.config import ContextAttention
from fast_dllm.model.backbone import DRAFTS_ON_CPU, ForwardBatch, Likeliest, RowSpan
from fast_dllm.model.forward import head_logits, hidden_states


class _SlabCache(Cache):  # type: ignore[misc]
    """Rows of one length, in the shape of a transformers cache."""

    def __init__(self, cache: SlabCache, slots: Tensor, positions: Tensor, rows: Sequence[RowSpan]) -> None:
        super().__init__(layers=[])
        self._cache = cache
        self._slots = slots
        self._positions = positions
        self._keys = max(row.visible_end for row in rows)
        first, last = rows[0].slot, rows[-1].slot
        # Slots that lie side by side are read in place; transformers wants one tensor, so others are gathered.
        side_by_side = last - first == len(rows) - 1
        self._rows: slice | Tensor = slice(first, last + 1)
        if not side_by_side:  # on the device once, not in every layer
            self._rows = torch.tensor([row.slot for row in rows]).to(slots.device, non_blocking=True)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write this forward's K/V in place; hand back all that the rows hold."""
        keys, values = (states.transpose(1, 2).flatten(0, 1) for states in (key_states, value_states))
        self._cache.write(layer_idx, self._slots, self._positions, keys, values)
        return self._cache.read(layer_idx, self._rows, self._keys)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens held; models use it only to guess positions, which we always give."""
        return self._keys


class _ShapeProbe(Cache):  # type: ignore[misc]
    """Learns the K/V of each layer from one forward: true for every architecture, config keys are not."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, LayerShape] = {}
        self.dtype = torch.float32

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Note shape, and dtype: a sharded bfloat16 run holds weights in float32."""
        self.dtype = value_states.dtype
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
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.draft_budget = DRAFTS_ON_CPU if model.device.type == "cpu" else None
        self.likeliest: Likeliest | None = None
        self._layers, self._dtype = self._probe_layers()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _probe_layers(self) -> tuple[list[LayerShape], torch.dtype]:
        zero = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        probe = _ShapeProbe()
        hidden_states(self.model, zero, zero, torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device), probe)
        return [probe.shapes[layer] for layer in sorted(probe.shapes)], probe.dtype

    def new_cache(self, slots: int, max_length: int) -> SlabCache:
        """Allocate a slab: [slots, kv_heads, max_length, head_dim] per layer."""
        return SlabCache(self._layers, slots, max_length, dtype=self._dtype, device=self.device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: SlabCache) -> Tensor:
        """Run the rows (see `Backbone.forward`).

        Returns:
            [N, vocabulary], float32 or the model's dtype if wider.
        """
        parts = [self._rows_of_one_length(batch, *run, cache) for run in batch.runs(side_by_side=False)]
        hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
        logits = head_logits(self.model, hidden[batch.read])
        return logits if logits.dtype == torch.float64 else logits.float()

    def _rows_of_one_length(self, batch: ForwardBatch, first: int, last: int, offset: int, cache: SlabCache) -> Tensor:
        """Hidden states of rows [first, last), laid end to end."""
        rows = batch.rows[first:last]
        here = slice(offset, offset + len(rows) * rows[0].length)
        mask = batch.mask(first, last, self.attention)
        if mask is None:  # transformers would take none for causal
            keys = max(row.visible_end for row in rows)
            mask = torch.ones(len(rows), 1, rows[0].length, keys, dtype=torch.bool, device=self.device)
        slab = _SlabCache(cache, batch.slots[here], batch.positions[here], rows)
        ids, positions = (tensor[here].view(len(rows), -1) for tensor in (batch.input_ids, batch.positions))
        return hidden_states(self.model, ids, positions, mask, slab).flatten(0, 1)
