"""The steps of a native forward in torch: any device, any dtype.

Shape legend: T positions of all rows, R rows of a group, Q positions of a row, K keys, H hidden width, I and O inputs
and outputs of a linear layer, G query heads per K/V head, E width of a head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from fast_dllm.cache import SlabCache
from fast_dllm.config import ContextAttention
from fast_dllm.gated_lora import LowRank
from fast_dllm.model.backbone import DRAFTS_ON_CPU, ForwardBatch, Likeliest
from fast_dllm.model.linear import AdaptedLinear, Linear, Precision, make_linear
from fast_dllm.model.weights import LayerWeights, Shape

_ALIGNED = 64
"""Bytes to which tensors in one piece of memory are aligned, as torch's own are."""

_LARGEST_KEPT = 64 << 20
"""Bytes of a mask above which it gets memory of its own: that of a long prompt, which is not to be held afterwards."""


@dataclass(frozen=True)
class _AttentionGroup:
    """Rows of one length whose slots lie side by side: one attention call on a view of the slab.

    Attributes:
        places: of the rows' positions in the batch.
        rows: R.
        slots: of the slab.
        keys: K.
        mask: additive, [R, 1, G * Q, K]; None where everything is seen.
    """

    places: slice
    rows: int
    slots: slice
    keys: int
    mask: Tensor | None


@dataclass(frozen=True)
class _Plan:
    """What all layers of a forward share.

    Attributes:
        batch: of the forward.
        cache: to write to, and to look at.
        groups: of its rows.
        cos: [T, 1, E].
        sin: [T, 1, E / 2]; its halves are equal.
        masked: [T, 1], 1 where a gated adapter acts and 0 elsewhere; None for nowhere.
    """

    batch: ForwardBatch
    cache: SlabCache
    groups: list[_AttentionGroup]
    cos: Tensor
    sin: Tensor
    masked: Tensor | None


class TorchSteps:
    """What is before and behind attention in a layer: the same steps, compiled or not."""

    likeliest: Likeliest | None = None

    def __init__(self, shape: Shape, attention: ContextAttention, device: torch.device) -> None:
        """Take note.

        Args:
            shape: of the model.
            attention: context attention of the checkpoint.
            device: of the model.
        """
        self._shape = shape
        self._attention: ContextAttention = attention
        self._device = device
        self.draft_budget = DRAFTS_ON_CPU if device.type == "cpu" else None

    def project(
        self, layer: LayerWeights, hidden: Tensor, cos: Tensor, sin: Tensor, masked: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, heads, E], keys and values [T, kv_heads, E] of [T, H]; queries and keys rotated."""
        shape = self._shape
        fused = self.linear(layer.qkv, hidden, layer.attention_norm, masked)
        parts = fused.view(len(fused), -1, shape.head_dim)
        rotated, values = parts.split([shape.query_heads + shape.kv_heads, shape.kv_heads], dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            queries, keys = rotated.split([shape.query_heads, shape.kv_heads], dim=1)
            rotated = torch.cat([self._norm(queries, layer.query_norm), self._norm(keys, layer.key_norm)], dim=1)
        rotated = _rotate(rotated, cos, sin)
        return rotated[:, : shape.query_heads], rotated[:, shape.query_heads :], values

    def finish(self, layer: LayerWeights, attended: Tensor, hidden: Tensor, masked: Tensor | None) -> None:
        """Add to `hidden` [T, H] what follows attention, whose output is [T, heads * E]."""
        hidden.add_(_product(layer.out, attended, masked))
        gate, up = self.linear(layer.gate_up, hidden, layer.mlp_norm, masked).chunk(2, dim=-1)
        hidden.add_(_product(layer.down, F.silu(gate).mul_(up), masked))

    def linear(self, layer: Linear, hidden: Tensor, norm: Tensor, masked: Tensor | None = None) -> Tensor:
        """A layer over normalised [T, I]: [T, O]."""
        return _product(layer, self._norm(hidden, norm), masked)

    def _norm(self, values: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(values, weight.shape, weight, self._shape.norm_epsilon)


class _Masks:
    """The masks of a forward over one cache, in memory that the next forward takes again."""

    def __init__(self, device: torch.device) -> None:
        """Take no memory yet.

        Args:
            device: of the cache.
        """
        self._columns = torch.empty(0, dtype=torch.long, device=device)
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._used = 0

    def begin(self) -> None:
        """Give up the masks made so far."""
        self._used = 0

    def make(self, ends: Tensor, keys: int, share: int, dtype: torch.dtype) -> Tensor:
        """An additive mask: SDPA would make one of a boolean mask in every layer.

        Args:
            ends: int64 [R, Q], where the keys end that a position sees.
            keys: K.
            share: G, queries of each position that see the same.
            dtype: of the mask.

        Returns:
            [R, 1, G * Q, K]: 0, or -inf for keys that are not seen.
        """
        if len(self._columns) < keys:
            self._columns = torch.arange(2 * keys, device=self._columns.device)
        rows, queries = ends.shape
        hidden = self._take((rows, 1, 1, queries, keys), torch.bool)
        torch.ge(self._columns[:keys], ends[:, None, None, :, None], out=hidden)
        mask = self._take((rows, 1, share, queries, keys), dtype)
        return mask.zero_().masked_fill_(hidden, -torch.inf).view(rows, 1, share * queries, keys)

    def _take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size > _LARGEST_KEPT:
            return torch.empty(shape, dtype=dtype, device=self._memory.device)
        end = self._used + size
        if end > len(self._memory):  # what the forward has taken so far stays where it is
            self._memory = torch.empty(end + end // 4, dtype=torch.uint8, device=self._memory.device)
        taken = self._memory[self._used : end]
        self._used = -(-end // _ALIGNED) * _ALIGNED
        return taken.view(dtype).view(shape)


class TorchOps(TorchSteps):
    """Linear layers, RoPE and attention with torch's kernels, attention by runs of rows."""

    def __init__(self, shape: Shape, attention: ContextAttention, device: torch.device, precision: Precision) -> None:
        """Choose the kernels.

        Args:
            shape: of the model.
            attention: context attention of the checkpoint.
            device: of the model.
            precision: of the linear layers.
        """
        super().__init__(shape, attention, device)
        self._precision: Precision = precision
        self._masks: WeakKeyDictionary[SlabCache, _Masks] = WeakKeyDictionary()

    def make_linear(self, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None = None) -> Linear:
        """A layer from weights [O, I], bias [O] and what a gated adapter adds."""
        base = make_linear(weight, bias, self._precision)
        return base if low_rank is None else AdaptedLinear(base, low_rank, self._shape.dtype)

    def new_cache(self, slots: int, max_length: int) -> SlabCache:
        """A slab."""
        shape = self._shape
        layers = [shape.cached] * shape.layers
        return SlabCache(layers, slots, max_length, dtype=shape.dtype, device=self._device)

    def plan(
        self, batch: ForwardBatch, cache: SlabCache, cos: Tensor, sin: Tensor, masked: Tensor | None = None
    ) -> _Plan:
        """Prepare a forward (see `Steps.plan`)."""
        cos, sin = cos[batch.positions, None], sin[batch.positions, None]
        masked = None if masked is None else masked[:, None].to(self._shape.dtype)
        if (masks := self._masks.get(cache)) is None:
            masks = self._masks[cache] = _Masks(self._device)
        masks.begin()
        return _Plan(batch, cache, self._groups(batch, masks), torch.cat([cos, cos], dim=-1), sin, masked)

    def layers(self, layers: Sequence[LayerWeights], hidden: Tensor, plan: _Plan) -> Tensor:
        """All layers, over the embedded positions [T, H], which are overwritten; what comes out at `read`: [N, H]."""
        read, masked = plan.batch.read, plan.masked
        last = len(layers) - 1
        for number, layer in enumerate(layers):
            queries, keys, values = self.project(layer, hidden, plan.cos, plan.sin, masked)
            plan.cache.write(number, plan.batch.slots, plan.batch.positions, keys, values)
            if number == last and not len(read):
                return hidden[:0]
            attended = self.attend(queries, number, plan)
            if number == last:
                # Nothing behind the last layer's K/V depends on positions that nobody reads.
                attended, hidden = attended[read], hidden[read]
                masked = None if masked is None else masked[read]
            self.finish(layer, attended, hidden, masked)
        return hidden

    def attend(self, queries: Tensor, number: int, plan: _Plan) -> Tensor:
        """Attention of every row over its slot: [T, heads * E]."""
        kv_heads, width = self._shape.kv_heads, self._shape.head_dim
        attended = []
        for group in plan.groups:
            # The G query heads of a K/V head are further queries to it: no K/V is repeated.
            of_group = queries[group.places].view(group.rows, -1, kv_heads, queries.shape[1] // kv_heads, width)
            folded = of_group.permute(0, 2, 3, 1, 4).reshape(group.rows, kv_heads, -1, width)
            keys, values = plan.cache.read(number, group.slots, group.keys)
            output = F.scaled_dot_product_attention(folded, keys, values, attn_mask=group.mask)
            unfolded = output.view(group.rows, kv_heads, -1, of_group.shape[1], width).permute(0, 3, 1, 2, 4)
            attended.append(unfolded.reshape(group.rows * of_group.shape[1], -1))
        return torch.cat(attended) if len(attended) > 1 else attended[0]

    def _groups(self, batch: ForwardBatch, masks: _Masks) -> list[_AttentionGroup]:
        share = self._shape.query_heads // self._shape.kv_heads
        groups = []
        for first, last, offset in batch.runs(side_by_side=True):
            rows = batch.rows[first:last]
            ends = batch.key_ends(first, last, self._attention)
            keys = max(row.visible_end for row in rows)
            groups.append(
                _AttentionGroup(
                    places=slice(offset, offset + len(rows) * rows[0].length),
                    rows=len(rows),
                    slots=slice(rows[0].slot, rows[-1].slot + 1),
                    keys=keys,
                    mask=None if ends is None else masks.make(ends, keys, share, self._shape.dtype),
                )
            )
        return groups


def _product(layer: Linear, inputs: Tensor, masked: Tensor | None) -> Tensor:
    if masked is None or not isinstance(layer, AdaptedLinear):
        return layer(inputs)
    return layer.where(masked, inputs)


def _rotate(values: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on [T, heads, E]."""
    first, second = values.chunk(2, dim=-1)
    rotated = values * cos
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    rotated_first.addcmul_(second, sin, value=-1)
    rotated_second.addcmul_(first, sin)
    return rotated
