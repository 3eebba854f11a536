"""The steps of a native forward in our own CPU kernels (`kernels/kernels.cpp`): int8 or bfloat16 weights.

A step is one call that passes pointers, so nothing but its arithmetic costs: no temporaries, no masks, no reordering.

Shape legend: T positions of all rows, R rows, I and O inputs and outputs of a linear layer, E width of a head.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from fast_dllm.cache import KVCache
from fast_dllm.config import ContextAttention
from fast_dllm.model.backbone import ForwardBatch
from fast_dllm.model.kernels import load_kernels
from fast_dllm.model.weights import LayerWeights, Shape

# Outputs of a panel of packed weights, and the bytes of a unit: as in kernels.cpp.
_PANEL, _UNIT = 48, 4
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
"""Widths of a head that the attention kernel is compiled for."""


class _Linear(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("weights", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class _Prologue(ctypes.Structure):
    _fields_ = (("norm", ctypes.c_void_p), ("epsilon", ctypes.c_float), ("gated", ctypes.c_int32))


class _Heads(ctypes.Structure):
    _fields_ = (("query", ctypes.c_int32), ("kv", ctypes.c_int32), ("width", ctypes.c_int32))


class _Slab(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("slot", ctypes.c_int64), ("head", ctypes.c_int64))


class KernelLinear:
    """Weights packed for the kernel: panels of 48 outputs, units of 4 bytes of inputs inside."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, int8: bool) -> None:
        """Pack.

        Args:
            weight: [O, I], of any floating dtype.
            bias: [O], or None.
            int8: quantise to 8 bits with a scale per output; else round to bfloat16.
        """
        outputs, inputs = weight.shape
        per_unit = _UNIT if int8 else _UNIT // 2
        weight = weight.float()
        self._scales = (weight.abs().amax(1).clamp(min=1e-12) / 127).contiguous() if int8 else None
        stored: Tensor
        if self._scales is not None:
            # Plus 128, since the VNNI instruction wants one unsigned side; the kernel takes it out again.
            stored = ((weight / self._scales[:, None]).round_() + 128).to(torch.uint8)
        else:
            stored = weight.to(torch.bfloat16)
        padded = torch.zeros(_up(outputs, _PANEL), _up(inputs, per_unit), dtype=stored.dtype)
        padded[:outputs, :inputs] = stored
        panels = padded.view(-1, _PANEL, padded.shape[1] // per_unit, per_unit)
        self._weights = panels.transpose(1, 2).contiguous()
        self._bias = None if bias is None else bias.float().contiguous()
        self.outputs = outputs
        self.c = _Linear(inputs, outputs, _pointer(self._weights), _pointer(self._scales), _pointer(self._bias))

    @property
    def nbytes(self) -> int:
        """Bytes that one forward reads."""
        return self._weights.nbytes


@dataclass(frozen=True)
class _Plan:
    """What all layers of a forward share."""

    batch: ForwardBatch
    cache: KVCache
    cos: Tensor
    sin: Tensor
    row_starts: Tensor
    ends: Tensor
    threads: int


class CpuOps:
    """Linear layers, RoPE and attention with our kernels; float32 activations, bfloat16 keys and values."""

    cache_dtype = torch.bfloat16

    def __init__(self, shape: Shape, attention: ContextAttention, *, int8: bool) -> None:
        """Load the kernels.

        Args:
            shape: of the model.
            attention: context attention of the checkpoint.
            int8: of the linear layers; else bfloat16.

        Raises:
            OSError: when they cannot be compiled (see `why_no_kernels`).
        """
        self._shape = shape
        self._attention: ContextAttention = attention
        self._int8 = int8
        self._kernels = load_kernels()
        self._heads = _Heads(shape.query_heads, shape.kv_heads, shape.head_dim)
        self._plain = _Prologue(None, 0.0, 0)
        self._gated = _Prologue(None, 0.0, 1)

    def make_linear(self, weight: Tensor, bias: Tensor | None) -> KernelLinear:
        """A layer from weights [O, I] and bias [O]."""
        return KernelLinear(weight, bias, int8=self._int8)

    def plan(self, batch: ForwardBatch, cache: KVCache, cos: Tensor, sin: Tensor) -> _Plan:
        """Prepare a forward; `cos` and `sin` are float32 [positions, E / 2]."""
        starts, ends = [0], []
        for row in batch.rows:
            starts.append(starts[-1] + row.length)
            ends += row.visible_ends(self._attention)
        return _Plan(
            batch=batch,
            cache=cache,
            cos=cos,
            sin=sin,
            row_starts=torch.tensor(starts, dtype=torch.int32),
            ends=torch.tensor(ends, dtype=torch.int32),
            threads=torch.get_num_threads(),
        )

    def linear(self, layer: KernelLinear, hidden: Tensor, norm: Tensor) -> Tensor:
        """A layer over normalised [T, I]: [T, O]."""
        prologue = _Prologue(_pointer(norm), self._shape.norm_epsilon, 0)
        output = torch.empty(len(hidden), layer.outputs)
        self._run(layer, prologue, hidden, output, add=False)
        return output

    def add_linear(self, layer: KernelLinear, inputs: Tensor, hidden: Tensor, *, gated: bool = False) -> None:
        """Add a layer's output to `hidden` [T, O]; gated inputs are [gate | up], of which silu(gate) * up is taken."""
        self._run(layer, self._gated if gated else self._plain, inputs, hidden, add=True)

    def _run(self, layer: KernelLinear, prologue: _Prologue, inputs: Tensor, output: Tensor, *, add: bool) -> None:
        self._kernels.fast_dllm_linear(
            ctypes.byref(layer.c),
            ctypes.byref(prologue),
            int(self._int8),
            len(inputs),
            _pointer(inputs),
            _pointer(output),
            int(add),
            torch.get_num_threads(),
        )

    def store(self, fused: Tensor, layer: LayerWeights, number: int, plan: _Plan) -> Tensor:
        """Write keys and values of [queries | keys | values] to the slab; the same tensor, queries rotated."""
        keys, values = self._slabs(plan.cache, number)
        self._kernels.fast_dllm_store(
            ctypes.byref(self._heads),
            len(fused),
            _pointer(fused),
            _pointer(plan.cos),
            _pointer(plan.sin),
            _pointer(layer.query_norm),
            _pointer(layer.key_norm),
            ctypes.c_float(self._shape.norm_epsilon),
            _pointer(plan.batch.slots),
            _pointer(plan.batch.positions),
            ctypes.byref(keys),
            ctypes.byref(values),
            plan.threads,
        )
        return fused

    def attend(self, queries: Tensor, number: int, plan: _Plan) -> Tensor:
        """Attention of every row over its slot, from what `store` returned: [T, heads * E]."""
        keys, values = self._slabs(plan.cache, number)
        output = torch.empty(len(queries), self._shape.query_heads * self._shape.head_dim)
        self._kernels.fast_dllm_attention(
            ctypes.byref(self._heads),
            len(plan.batch.rows),
            _pointer(plan.row_starts),
            _pointer(plan.batch.slots),
            _pointer(plan.ends),
            _pointer(queries),
            ctypes.byref(keys),
            ctypes.byref(values),
            _pointer(output),
            plan.threads,
        )
        return output

    def _slabs(self, cache: KVCache, number: int) -> tuple[_Slab, _Slab]:
        keys, values = cache.keys[number], cache.values[number]
        return (
            _Slab(_pointer(keys), keys.stride(0), keys.stride(1)),
            _Slab(_pointer(values), values.stride(0), values.stride(1)),
        )


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
