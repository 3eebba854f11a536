"""The torch steps compiled in static shapes: a few compilations serve every batch, and a GPU replays CUDA graphs.

The positions of a forward are padded to a bucket. All slots of the slab are one sequence of keys, of which each
position sees a range: so rows of any number, length and context have one shape. What a padding position writes goes
behind the last slot, where it alone looks.

Attention is flex_attention: it takes the ranges as data, computes the tiles listed for it, reads K/V where they lie,
and holds nothing of the size of positions times keys. SDPA would need an additive mask of that size and the rows' K/V
gathered into one tensor, or a call for every run of equal rows, which no static shape has.

Shape legend: as in torch_ops.py; B positions of a bucket, C tiles of them, N tiles of keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fast_dllm.cache import SlabCache
from fast_dllm.config import ContextAttention
from fast_dllm.gated_lora import LowRank
from fast_dllm.model.backbone import ForwardBatch
from fast_dllm.model.linear import AdaptedLinear, DenseLinear, Linear, Precision
from fast_dllm.model.torch_ops import TorchSteps
from fast_dllm.model.weights import LayerWeights, Shape

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import FlexKernelOptions

# flex_attention's own tile, which its kernels for many and for few queries both take.
_TILE = 128
# Every bucket is one more compilation of the same code, of which torch allows 8 by default.
_COMPILATIONS = 1000


class _Inputs(NamedTuple):
    """What a forward is given besides weights and slab.

    Attributes:
        hidden: [B, H]; overwritten by what comes out.
        cos: [B, 1, E].
        sin: [B, 1, E / 2].
        places: int64 [B]; in the flat slab, where K/V go.
        first: int64 [B]; there, the first key seen.
        end: int64 [B]; there, the end of the keys seen.
        masked: [B, 1]; 1 where a gated adapter acts and 0 elsewhere.
        tile_counts: int32 [1, 1, C]; how many tiles of keys a tile of positions looks at.
        tiles: int32 [1, 1, C, N]; their numbers.
    """

    hidden: Tensor
    cos: Tensor
    sin: Tensor
    places: Tensor
    first: Tensor
    end: Tensor
    masked: Tensor
    tile_counts: Tensor
    tiles: Tensor


@dataclass(frozen=True)
class _Plan:
    """A forward: [T] of everything, tiles for the whole bucket."""

    batch: ForwardBatch
    cache: SlabCache
    cos: Tensor
    sin: Tensor
    places: Tensor
    first: Tensor
    end: Tensor
    masked: Tensor
    tile_counts: Tensor
    tiles: Tensor


class CompiledOps(TorchSteps):
    """The layers as one compiled function of a layer; the LM head, which sees another number of positions, is not."""

    def __init__(self, shape: Shape, attention: ContextAttention, device: torch.device) -> None:
        """Compile nothing yet: a bucket is compiled when it first comes up.

        Args:
            shape: of the model.
            attention: context attention of the checkpoint.
            device: of the model.
        """
        super().__init__(shape, attention, device)
        self._compiled: Callable[..., None] = torch.compile(self._layer, fullgraph=True, dynamic=False)
        self._buckets: WeakKeyDictionary[SlabCache, dict[int, _Bucket]] = WeakKeyDictionary()

    def make_linear(self, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None = None) -> Linear:
        """A layer from weights [O, I], bias [O] and what a gated adapter adds."""
        base = DenseLinear(weight, bias)  # the compiler cannot look into packed ones
        return base if low_rank is None else AdaptedLinear(base, low_rank, self._shape.dtype)

    def new_cache(self, slots: int, max_length: int) -> SlabCache:
        """A slab for compiled forwards.

        Slots are whole tiles, so that a row's sums do not depend on its slot; the padding's place is a tile behind
        them. A slab of another size is no reason to compile again.
        """
        shape = self._shape
        layers = [shape.cached] * shape.layers
        length = -(-max_length // _TILE) * _TILE
        cache = SlabCache(layers, slots, length, dtype=shape.dtype, device=self._device, spare=_TILE)
        for slab in (*cache.flat_keys, *cache.flat_values):
            torch._dynamo.maybe_mark_dynamic(slab, 2)
        return cache

    def plan(
        self, batch: ForwardBatch, cache: SlabCache, cos: Tensor, sin: Tensor, masked: Tensor | None = None
    ) -> _Plan:
        """Prepare a forward (see `Steps.plan`)."""
        masked = torch.zeros_like(batch.positions) if masked is None else masked
        cos, sin = cos[batch.positions, None], sin[batch.positions, None]
        ends = [row.visible_ends(self._attention) for row in batch.rows]
        first = batch.slots * cache.max_length
        tile_counts, tiles = _tiles_of_keys(batch, ends, cache)
        device = batch.positions.device
        return _Plan(
            batch=batch,
            cache=cache,
            cos=torch.cat([cos, cos], dim=-1),
            sin=sin,
            places=first + batch.positions,
            first=first,
            end=first + torch.tensor([end for row in ends for end in row]).to(device, non_blocking=True),
            masked=masked[:, None].to(self._shape.dtype),
            tile_counts=tile_counts.to(device, non_blocking=True),
            tiles=tiles.to(device, non_blocking=True),
        )

    def layers(self, layers: Sequence[LayerWeights], hidden: Tensor, plan: _Plan) -> Tensor:
        """All layers, over the embedded positions [T, H]; what comes out at `read`: [N, H]."""
        buckets = self._buckets.setdefault(plan.cache, {})
        size = bucket_size(len(hidden))
        if size not in buckets:
            buckets[size] = _Bucket(size, hidden, plan)
        inputs = buckets[size].fill(hidden, plan)
        with torch._dynamo.config.patch(recompile_limit=_COMPILATIONS, accumulated_recompile_limit=_COMPILATIONS):
            buckets[size].run(partial(self._all_layers, layers, plan.cache, inputs))
        return inputs.hidden[plan.batch.read]

    def _all_layers(self, layers: Sequence[LayerWeights], cache: SlabCache, inputs: _Inputs) -> None:
        # One layer is compiled, not all of them: they differ in nothing but their tensors.
        for layer, keys, values in zip(layers, cache.flat_keys, cache.flat_values, strict=True):
            self._compiled(layer, keys, values, inputs)

    def _layer(self, layer: LayerWeights, slab_keys: Tensor, slab_values: Tensor, inputs: _Inputs) -> None:
        """A layer over a bucket; the slab is flat, [1, kv_heads, positions, E]."""
        queries, keys, values = self.project(layer, inputs.hidden, inputs.cos, inputs.sin, inputs.masked)
        slab_keys[0, :, inputs.places] = keys.transpose(0, 1)
        slab_values[0, :, inputs.places] = values.transpose(0, 1)
        first, end = inputs.first, inputs.end

        def sees(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= first[query]) & (key < end[query])

        block_mask = BlockMask.from_kv_blocks(
            inputs.tile_counts,
            inputs.tiles,
            BLOCK_SIZE=_TILE,
            mask_mod=sees,
            seq_lengths=(len(queries), slab_keys.shape[2]),
            compute_q_blocks=False,
        )
        # Four dimensions from the start, and contiguous: inductor's CPU kernel takes no view for its queries.
        attended = flex_attention(
            queries[None].transpose(1, 2).clone(memory_format=torch.contiguous_format),
            slab_keys,
            slab_values,
            block_mask=block_mask,
            enable_gqa=True,
            kernel_options=_kernel_options(queries.shape, slab_keys),
        )
        self.finish(layer, attended[0].transpose(0, 1).flatten(1), inputs.hidden, inputs.masked)


class _Bucket:
    """Tensors that stay where they are for forwards of up to some positions over one slab, and their CUDA graph."""

    def __init__(self, size: int, hidden: Tensor, plan: _Plan) -> None:
        """Allocate.

        Args:
            size: B.
            hidden: of the first forward; shapes, dtypes and device are taken from it.
            plan: of the first forward.
        """

        def room(given: Tensor) -> Tensor:
            return given.new_zeros(size, *given.shape[1:])

        self._inputs = _Inputs(
            hidden=room(hidden),
            cos=room(plan.cos),
            sin=room(plan.sin),
            places=room(plan.places),
            first=room(plan.first),
            end=room(plan.end),
            masked=room(plan.masked),
            tile_counts=plan.tile_counts.clone(),
            tiles=plan.tiles.clone(),
        )
        torch._dynamo.maybe_mark_dynamic(self._inputs.tiles, 3)
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def fill(self, hidden: Tensor, plan: _Plan) -> _Inputs:
        """Put a forward in, behind it padding positions that write to, and see, the place behind the last slot."""
        count, inputs = len(hidden), self._inputs
        # Zeros, since a padding position's own output would come in again, and grow.
        inputs.hidden[count:].zero_()
        spare = plan.cache.slots * plan.cache.max_length
        for static in (inputs.places, inputs.first):
            static[count:].fill_(spare)
        inputs.end[count:].fill_(spare + 1)
        inputs.hidden[:count] = hidden
        for name in ("cos", "sin", "places", "first", "end", "masked"):
            getattr(inputs, name)[:count] = getattr(plan, name)
        inputs.tile_counts.copy_(plan.tile_counts)
        inputs.tiles.copy_(plan.tiles)
        return inputs

    def run(self, forward: Callable[[], None]) -> None:
        """Run a forward over what was filled in.

        On a GPU the second one is captured, and replayed from then on; the first compiles, and a bucket that comes
        up once is not worth a graph. `forward` must compute the same thing over the same tensors every time.
        """
        self._runs += 1
        if self._inputs.hidden.device.type != "cuda" or self._runs == 1:
            forward()
            return
        if self._graph is None:
            graph, device = torch.cuda.CUDAGraph(), self._inputs.hidden.device
            # torch's own capture stream is of the device that was current when it was first needed; work on another
            # one would not be captured, and replaying would compute nothing.
            with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                forward()
            self._graph = graph
        self._graph.replay()


def _kernel_options(queries: Sequence[int], keys: Tensor) -> "FlexKernelOptions | None":
    """What flex_attention has to be told, on a GPU.

    For few queries it takes a decoding kernel whose tile holds those of all heads that share a K/V head, and finds none
    that divides ours where they are more (https://github.com/pytorch/pytorch/pull/185349).

    Args:
        queries: shape, [T, heads, E].
        keys: of the slab, [1, kv_heads, positions, E].
    """
    together = queries[0] * queries[1] // keys.shape[1]
    return {"FORCE_USE_FLEX_ATTENTION": True} if keys.is_cuda and queries[0] < _TILE < together else None


def bucket_size(positions: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is no less: two buckets for each doubling."""
    power = 1 << (positions - 1).bit_length()
    between = power * 3 // 4
    return between if positions <= between else power


def why_not_compiled(device: torch.device, dtype: torch.dtype, precision: Precision) -> str | None:
    """Why a model cannot be compiled here; None if it can."""
    if precision == "int8":
        return "int8 weights are packed, and the compiler cannot look into them"
    if dtype == torch.float64:
        return "flex_attention does not compute in float64"
    if device.type == "cpu":
        return _why_no_cpp()
    return None if device.type == "cuda" else f"nobody has tried it on {device.type}"


def _why_no_cpp() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if not torch.cpu._is_avx2_supported():
        return "flex_attention needs AVX2"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler"
    return None


def _tiles_of_keys(batch: ForwardBatch, ends: list[list[int]], cache: SlabCache) -> tuple[Tensor, Tensor]:
    """Which tiles of keys each tile of positions looks at: int32 [1, 1, C] and [1, 1, C, N] (see `_Inputs`)."""
    size = bucket_size(len(batch.input_ids))
    last = cache.slots * cache.max_length // _TILE
    seen: list[list[int]] = [[] for _ in range(-(-size // _TILE))]
    start = 0
    for row, row_ends in zip(batch.rows, ends, strict=True):
        for number in range(start // _TILE, (start + row.length - 1) // _TILE + 1):
            # Ends do not fall within a row: that of its last position here is the largest.
            end = row_ends[min((number + 1) * _TILE - start, row.length) - 1]
            first_tile = row.slot * cache.max_length // _TILE
            seen[number] += range(first_tile, first_tile + -(-end // _TILE))
        start += row.length
    if start < size:
        for tiles in seen[start // _TILE :]:
            tiles.append(last)
    tile_counts = torch.tensor([[list(map(len, seen))]], dtype=torch.int32)
    padded = [tiles + [0] * (last + 1 - len(tiles)) for tiles in seen]
    return tile_counts, torch.tensor([[padded]], dtype=torch.int32)
