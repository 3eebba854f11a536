"""The steps of a native forward in our own CPU kernels (`kernels/kernels.cpp`): int8 or bfloat16 weights.

A step is one call that passes pointers, so nothing but its arithmetic costs: no temporaries, no masks, no reordering.

Shape legend: T positions of all rows, R rows, I and O inputs and outputs of a linear layer, E width of a head.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

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
        self._c = _Linear(inputs, outputs, _pointer(self._weights), _pointer(self._scales), _pointer(self._bias))
        self.reference = ctypes.byref(self._c)


@dataclass(frozen=True)
class _Plan:
    """What all layers of a forward share."""

    batch: ForwardBatch
    slabs: Any
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
        kernels = load_kernels()
        self._run_linear, self._run_store, self._run_attention = (
            kernels.fast_dllm_linear,
            kernels.fast_dllm_store,
            kernels.fast_dllm_attention,
        )
        # A step is called for every layer: structures are made once, and pointers go as plain integers.
        pointer: Any = ctypes.c_void_p
        integer: Any = ctypes.c_int
        self._run_linear.argtypes = [pointer] * 2 + [integer] * 2 + [pointer] * 2 + [integer] * 2
        self._run_store.argtypes = [pointer, integer] + [pointer] * 5 + [ctypes.c_float] + [pointer] * 4 + [integer]
        self._run_attention.argtypes = [pointer, integer] + [pointer] * 7 + [integer]
        self._heads = ctypes.byref(_Heads(shape.query_heads, shape.kv_heads, shape.head_dim))
        self._plain = ctypes.byref(_Prologue(None, 0.0, 0))
        self._gated = ctypes.byref(_Prologue(None, 0.0, 1))
        self._norms: dict[int, Any] = {}
        self._slabs: WeakKeyDictionary[KVCache, list[Any]] = WeakKeyDictionary()

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
            slabs=self._slabs_of(cache),
            cos=cos,
            sin=sin,
            row_starts=torch.tensor(starts, dtype=torch.int32),
            ends=torch.tensor(ends, dtype=torch.int32),
            threads=torch.get_num_threads(),
        )

    def layers(self, layers: Sequence[LayerWeights], hidden: Tensor, plan: _Plan) -> Tensor:
        """All layers, over the embedded positions [T, H], which are overwritten; what comes out at `read`: [N, H]."""
        read = plan.batch.read
        last = len(layers) - 1
        for number, layer in enumerate(layers):
            fused = self.linear(layer.qkv, hidden, layer.attention_norm)
            queries = self.store(fused, layer, number, plan)
            if number == last and not len(read):
                return hidden[:0]
            attended = self.attend(queries, number, plan)
            if number == last:
                # Nothing behind the last layer's K/V depends on positions that nobody reads.
                attended, hidden = attended[read], hidden[read]
            self.add_linear(layer.out, attended, hidden)
            gate_up = self.linear(layer.gate_up, hidden, layer.mlp_norm)
            self.add_linear(layer.down, gate_up, hidden, gated=True)
        return hidden

    def linear(self, layer: KernelLinear, hidden: Tensor, norm: Tensor) -> Tensor:
        """A layer over normalised [T, I]: [T, O]."""
        pointer = norm.data_ptr()
        prologue = self._norms.get(pointer)
        if prologue is None:
            prologue = self._norms[pointer] = ctypes.byref(_Prologue(pointer, self._shape.norm_epsilon, 0))
        output = torch.empty(len(hidden), layer.outputs)
        self._run(layer, prologue, hidden, output, add=False)
        return output

    def add_linear(self, layer: KernelLinear, inputs: Tensor, hidden: Tensor, *, gated: bool = False) -> None:
        """Add a layer's output to `hidden` [T, O]; gated inputs are [gate | up], of which silu(gate) * up is taken."""
        self._run(layer, self._gated if gated else self._plain, inputs, hidden, add=True)

    def _run(self, layer: KernelLinear, prologue: Any, inputs: Tensor, output: Tensor, *, add: bool) -> None:
        self._run_linear(
            layer.reference,
            prologue,
            self._int8,
            len(inputs),
            inputs.data_ptr(),
            output.data_ptr(),
            add,
            torch.get_num_threads(),
        )

    def store(self, fused: Tensor, layer: LayerWeights, number: int, plan: _Plan) -> Tensor:
        """Write keys and values of [queries | keys | values] to the slab; the same tensor, queries rotated."""
        keys, values = plan.slabs[number]
        self._run_store(
            self._heads,
            len(fused),
            fused.data_ptr(),
            plan.cos.data_ptr(),
            plan.sin.data_ptr(),
            _pointer(layer.query_norm),
            _pointer(layer.key_norm),
            self._shape.norm_epsilon,
            plan.batch.slots.data_ptr(),
            plan.batch.positions.data_ptr(),
            keys,
            values,
            plan.threads,
        )
        return fused

    def attend(self, queries: Tensor, number: int, plan: _Plan) -> Tensor:
        """Attention of every row over its slot, from what `store` returned: [T, heads * E]."""
        keys, values = plan.slabs[number]
        output = torch.empty(len(queries), self._shape.query_heads * self._shape.head_dim)
        self._run_attention(
            self._heads,
            len(plan.batch.rows),
            plan.row_starts.data_ptr(),
            plan.batch.slots.data_ptr(),
            plan.ends.data_ptr(),
            queries.data_ptr(),
            keys,
            values,
            output.data_ptr(),
            plan.threads,
        )
        return output

    def _slabs_of(self, cache: KVCache) -> list[Any]:
        """(keys, values) of every layer."""
        slabs = self._slabs.get(cache)
        if slabs is None:
            slabs = [
                tuple(ctypes.byref(_Slab(slab.data_ptr(), slab.stride(0), slab.stride(1))) for slab in pair)
                for pair in zip(cache.keys, cache.values, strict=True)
            ]
            self._slabs[cache] = slabs
        return slabs


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
