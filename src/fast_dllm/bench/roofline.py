"""The least time a forward could take on this machine."""

from dataclasses import dataclass
from typing import Any

import torch

from fast_dllm.bench.peaks import Peaks
from fast_dllm.cache import KVCache
from fast_dllm.gated_lora import is_of_adapter

_INT8_BYTES = 1


@dataclass(frozen=True)
class Costs:
    """What a forward has to move and compute.

    Attributes:
        body: weights of the decoder, the embedding left out (a forward reads a few rows of it).
        at_masks: weights of a gated adapter, which only a forward with masks reads.
        head: weights of the LM head.
        weight_bytes: of one weight.
        kv_bytes: of one token's keys and values, over all layers.
        attention_flops: of one query over one key, over all layers.
    """

    body: int
    at_masks: int
    head: int
    weight_bytes: int
    kv_bytes: int
    attention_flops: int

    def bytes(self, positions: int, context: int, *, head: bool) -> int:
        """Read by a forward: every weight once, and the K/V of context and positions."""
        weights = self._weights(positions, head=head)
        return weights * self.weight_bytes + (context + positions) * self.kv_bytes

    def flops(self, positions: int, context: int, *, head: bool) -> int:
        """Done by a forward: two for every weight and position, and attention."""
        weights = self._weights(positions, head=head)
        return 2 * weights * positions + positions * (context + positions) * self.attention_flops

    def _weights(self, positions: int, *, head: bool) -> int:
        # One position is a final token, as in AR decoding, and several are masks (bench/forward.py).
        return self.body + (self.at_masks if positions > 1 else 0) + (self.head if head else 0)


def costs_of(model: Any, cache: KVCache, dtype: str) -> Costs:
    """Costs of a dense model.

    Args:
        model: a transformers `...ForCausalLM`.
        cache: of its backbone.
        dtype: of the linear layers' weights.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = embedding.data_ptr() == head.data_ptr() and embedding.device.type != "meta"
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    at_masks = sum(size for name, size in sizes.items() if is_of_adapter(name))
    outside = embedding.numel() + (0 if tied else head.numel())
    query_heads = model.config.get_text_config().num_attention_heads
    widths = sum(layer.key_width + layer.value_width for layer in cache.layers)
    return Costs(
        body=sum(sizes.values()) - at_masks - outside,
        at_masks=at_masks,
        head=head.numel(),
        weight_bytes=_INT8_BYTES if dtype == "int8" else torch.empty(0, dtype=getattr(torch, dtype)).element_size(),
        kv_bytes=cache.bytes_per_token,
        # Scores cost 2 per width of a key, the weighted sum 2 per width of a value.
        attention_flops=2 * query_heads * widths,
    )


def least_seconds(costs: Costs, peaks: Peaks, dtype: str, positions: int, context: int, *, head: bool) -> float:
    """Roofline: the longer of reading and computing, in seconds.

    Args:
        costs: of the model.
        peaks: of the machine.
        dtype: whose matrix products are meant.
        positions: of the forward.
        context: tokens before them.
        head: whether all logits are computed.
    """
    reading = costs.bytes(positions, context, head=head) / peaks.bandwidth
    computing = costs.flops(positions, context, head=head) / peaks.flops[dtype]
    return max(reading, computing)
