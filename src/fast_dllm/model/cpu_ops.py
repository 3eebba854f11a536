"""A native forward in our own CPU kernels (`kernels/`): int8 or bfloat16 weights.

All layers are one call that passes pointers, so nothing but arithmetic costs: no temporaries, no masks, no reordering.

Shape legend: T positions of all rows, R rank of a gated adapter, I and O inputs and outputs of a linear layer, E width
of a head.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from fast_dllm.config import ContextAttention
from fast_dllm.gated_lora import LowRank
from fast_dllm.model.backbone import DRAFTS_ON_CPU, DRAFTS_ON_OLDER_CPU, ForwardBatch
from fast_dllm.model.cpu_cache import CpuCache
from fast_dllm.model.kernels import WeightMemory, load_kernels, why_no_kernels
from fast_dllm.model.weights import LayerWeights, Shape

# Outputs of a panel of packed weights, bytes of a unit, what a rank is a multiple of, and lanes of a vector: as in
# kernels/linear.h.
_PANEL, _UNIT, _DOTS, _LANES = 32, 4, 4, 16
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
"""Widths of a head that the attention kernel is compiled for."""


PARTS = ("linear", "attention", "head", "rest")


class _Linear(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("qkv", _Linear),
        ("out", _Linear),
        ("gate_up", _Linear),
        ("down", _Linear),
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("query_heads", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("int8", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("layers", ctypes.POINTER(_Layer)),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int32),
        ("positions", ctypes.c_int32),
        ("read_count", ctypes.c_int32),
        ("row_starts", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("read", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("masked", ctypes.c_void_p),
    )


class _Cache(ctypes.Structure):
    _fields_ = (
        ("int8", ctypes.c_int32),
        ("slot", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("layers", ctypes.POINTER(ctypes.c_void_p)),
    )


class KernelLinear:
    """Weights packed for the kernel: panels of 32 outputs, units of 4 bytes of inputs inside."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None, memory: WeightMemory, *, int8: bool
    ) -> None:
        """Pack.

        Args:
            weight: [O, I], of any floating dtype.
            bias: [O], or None.
            low_rank: what a gated adapter adds, or None.
            memory: for the packed weights.
            int8: quantise to 8 bits with a scale per output; else round to bfloat16.
        """
        outputs, inputs = weight.shape
        weight = weight.float()
        self._scales = (weight.abs().amax(1).clamp(min=1e-12) / 127).contiguous() if int8 else None
        self._weights = _placed(self._packed(weight), memory)
        self._bias = None if bias is None else bias.float().contiguous()
        self._up = self._down = None
        rank = 0
        if low_rank is not None:
            down, up = _whole(low_rank)
            if self._scales is not None:
                down, up = _in_steps(down, up, self._scales)
            rank = len(down)
            self._up = _placed(self._packed(up), memory)
            self._down = _placed(down.to(torch.bfloat16).view(rank, -1, 2, _LANES).transpose(2, 3), memory)
        self.outputs = outputs
        pointers = map(_pointer, (self._weights, self._scales, self._bias, self._up, self._down))
        self.structure = _Linear(inputs, outputs, rank, *pointers)

    def _packed(self, weight: Tensor) -> Tensor:
        """Float32 weights [O, ..] as the kernel holds them."""
        stored: Tensor
        if self._scales is not None:
            # Plus 128, since the VNNI instruction wants one unsigned side; the kernel takes it out again.
            stored = ((weight / self._scales[:, None]).round_().clamp_(-127, 127) + 128).to(torch.uint8)
        else:
            stored = weight.to(torch.bfloat16)
        per_unit = _UNIT // stored.element_size()
        outputs, inputs = weight.shape
        padded = torch.zeros(_up(outputs, _PANEL), _up(inputs, per_unit), dtype=stored.dtype)
        padded[:outputs, :inputs] = stored
        return padded.view(-1, _PANEL, padded.shape[1] // per_unit, per_unit).transpose(1, 2)


@dataclass(frozen=True)
class _Plan:
    """What a forward passes to the kernels; `kept` owns what the structure points to."""

    batch: _Batch
    cache: _Cache
    kept: tuple[Any, ...]


class CpuOps:
    """Linear layers, RoPE and attention with our kernels; float32 activations, K/V as the cache keeps them."""

    def __init__(self, shape: Shape, attention: ContextAttention, *, int8: bool, int8_cache: bool = False) -> None:
        """Load the kernels.

        Args:
            shape: of the model.
            attention: context attention of the checkpoint.
            int8: of the linear layers; else bfloat16.
            int8_cache: of K/V; else bfloat16.

        Raises:
            OSError: when they cannot be compiled (see `why_no_kernels`).
        """
        self._shape = shape
        self._attention: ContextAttention = attention
        self._int8, self._int8_cache = int8, int8_cache
        self._memory = WeightMemory()
        kernels = load_kernels()
        # Of AVX-512 VNNI or AVX-VNNI; bfloat16 gains nothing from either.
        sums_bytes = bool(kernels.fast_dllm_byte_products())
        self.draft_budget = DRAFTS_ON_CPU if sums_bytes or not int8 else DRAFTS_ON_OLDER_CPU
        self._run_layers, self._run_linear = kernels.fast_dllm_layers, kernels.fast_dllm_linear
        self._run_likeliest = kernels.fast_dllm_likeliest
        pointer: Any = ctypes.c_void_p
        integer: Any = ctypes.c_int
        self._run_layers.argtypes = [pointer] * 5 + [integer]
        self._run_linear.argtypes = [pointer, integer, pointer, ctypes.c_float, integer, pointer, pointer, integer]
        self._run_likeliest.argtypes = [pointer, integer, integer, integer, pointer, pointer, integer]
        self._model: tuple[Sequence[LayerWeights], _Model] | None = None
        self._caches: WeakKeyDictionary[CpuCache, _Cache] = WeakKeyDictionary()

    def make_linear(self, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None = None) -> KernelLinear:
        """A layer from weights [O, I], bias [O] and what a gated adapter adds."""
        return KernelLinear(weight, bias, low_rank, self._memory, int8=self._int8)

    def new_cache(self, slots: int, max_length: int) -> CpuCache:
        """Memory in the order of the kernels."""
        return CpuCache(self._shape.layers, self._shape.cached, slots, max_length, int8=self._int8_cache)

    def plan(
        self, batch: ForwardBatch, cache: CpuCache, cos: Tensor, sin: Tensor, masked: Tensor | None = None
    ) -> _Plan:
        """Prepare a forward (see `Steps.plan`); `cos` and `sin` are float32."""
        starts, ends = [0], []
        for row in batch.rows:
            starts.append(starts[-1] + row.length)
            ends += row.visible_ends(self._attention)
        row_starts, key_ends = torch.tensor(starts, dtype=torch.int32), torch.tensor(ends, dtype=torch.int32)
        tensors = (row_starts, key_ends, batch.slots, batch.positions, batch.read, cos, sin, masked)
        structure = _Batch(len(batch.rows), len(ends), len(batch.read), *map(_pointer, tensors))
        return _Plan(structure, self._cache_of(cache), tensors)

    def layers(self, layers: Sequence[LayerWeights], hidden: Tensor, plan: _Plan) -> Tensor:
        """All layers, over the embedded positions [T, H], which are overwritten; what comes out at `read`: [N, H]."""
        output = torch.empty(plan.batch.read_count, hidden.shape[1])
        self._run_layers(
            ctypes.byref(self._model_of(layers)),
            ctypes.byref(plan.batch),
            ctypes.byref(plan.cache),
            hidden.data_ptr(),
            output.data_ptr(),
            torch.get_num_threads(),
        )
        return output

    def linear(self, layer: KernelLinear, hidden: Tensor, norm: Tensor | None) -> Tensor:
        """A layer over [T, I], normalised where there is a norm [I]: [T, O]."""
        output = torch.empty(len(hidden), layer.structure.outputs)
        self._run_linear(
            ctypes.byref(layer.structure),
            self._int8,
            _pointer(norm),
            self._shape.norm_epsilon,
            len(hidden),
            hidden.data_ptr(),
            output.data_ptr(),
            torch.get_num_threads(),
        )
        return output

    def likeliest(self, logits: Tensor, banned: int | None) -> tuple[Tensor, Tensor]:
        """See `Backbone.likeliest`."""
        logits = logits.contiguous()
        tokens, probabilities = torch.empty(len(logits), dtype=torch.long), torch.empty(len(logits))
        self._run_likeliest(
            logits.data_ptr(),
            *logits.shape,
            -1 if banned is None else banned,
            tokens.data_ptr(),
            probabilities.data_ptr(),
            torch.get_num_threads(),
        )
        return tokens, probabilities

    def _model_of(self, layers: Sequence[LayerWeights]) -> _Model:
        """The layers as the kernels see them, made once."""
        if self._model is None or self._model[0] is not layers:
            shape = self._shape
            structures = (_Layer * len(layers))(*map(_layer, layers))
            model = _Model(
                shape.query_heads,
                shape.kv_heads,
                shape.head_dim,
                shape.norm_epsilon,
                self._int8,
                len(layers),
                structures,
            )
            self._model = layers, model
        return self._model[1]

    def _cache_of(self, cache: CpuCache) -> _Cache:
        """A cache as the kernels see it, made once."""
        structure = self._caches.get(cache)
        if structure is None:
            layers = (ctypes.c_void_p * len(cache.data))(*(layer.data_ptr() for layer in cache.data))
            structure = _Cache(cache.int8, cache.data.stride(1), cache.data.stride(2), layers)
            self._caches[cache] = structure
        return structure


@contextmanager
def kernel_seconds() -> Iterator[dict[str, float]]:
    """Seconds that our kernels spend inside, by part: linear, attention, head, rest. Known at the end."""
    seconds = dict.fromkeys(PARTS, 0.0)
    if why_no_kernels() is not None:
        yield seconds
        return
    kernels, array = load_kernels(), (ctypes.c_double * len(PARTS))()
    kernels.fast_dllm_watch(array)
    try:
        yield seconds
    finally:
        kernels.fast_dllm_watch(None)
        seconds.update(zip(PARTS, array, strict=True))


def _layer(layer: LayerWeights) -> _Layer:
    norms = (layer.attention_norm, layer.mlp_norm, layer.query_norm, layer.key_norm)
    linears = (layer.qkv, layer.out, layer.gate_up, layer.down)
    return _Layer(*(linear.structure for linear in linears), *map(_pointer, norms))


def _whole(low_rank: LowRank) -> LowRank:
    """In float32, padded to what the kernel takes: the rank, and the inputs of `down`."""
    rank, inputs = low_rank.down.shape
    missing = -rank % _DOTS
    down = F.pad(low_rank.down.float(), (0, -inputs % (2 * _LANES), 0, missing))
    return LowRank(down, F.pad(low_rank.up.float(), (0, missing)))


def _in_steps(down: Tensor, up: Tensor, scales: Tensor) -> LowRank:
    """The same product, `up` as large as the steps [O] of the weights allow.

    The weights' steps are not to change, and those of x are too coarse for anything much smaller than x: so neither
    factor has digits to give away. Outputs of next to no weight would make `up` small for all, and down @ x larger than
    x; they are clipped instead, which can change a draft, but no answer.
    """
    steps = scales.clamp(min=scales.median() / 16)
    factor = (127 * steps[:, None] / up.abs()).amin(0)
    factor = factor.where(factor.isfinite(), 1)  # nothing to add
    return LowRank(down / factor[:, None], up * factor)


def _placed(values: Tensor, memory: WeightMemory) -> Tensor:
    """A copy in a memory."""
    place = memory.take(values.numel() * values.element_size()).view(values.dtype).view(values.shape)
    return place.copy_(values)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
