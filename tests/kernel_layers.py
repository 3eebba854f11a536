"""A decoder layer in our CPU kernels, and the same in plain torch arithmetic of the rounded operands."""

import pytest
import torch
from torch.nn import functional as F

from fast_dllm.model.backbone import RowSpan
from fast_dllm.model.cpu_ops import CpuOps
from fast_dllm.model.kernels import load_kernels, why_no_kernels
from fast_dllm.model.weights import LayerWeights, Shape
from packed_cache import turned, unpacked

HAS_KERNELS = pytest.mark.skipif(why_no_kernels() is not None, reason=str(why_no_kernels()))
both_kinds = pytest.mark.parametrize("kind", [pytest.param(kind, marks=HAS_KERNELS) for kind in ("int8", "bfloat16")])
both_caches = pytest.mark.parametrize("int8_cache", [False, True], ids=["bfloat16 cache", "int8 cache"])


def shape(query_heads=4, kv_heads=2, head_dim=16):
    return Shape(1, query_heads, kv_heads, head_dim, 64, 1e-5, torch.float32)


def steps_of(inputs):
    """The step of each row [.., I] in int8, [.., 1]."""
    magnitudes = F.pad(inputs.abs(), (0, inputs.shape[-1] % 2)).unflatten(-1, (-1, 2))
    own_range = load_kernels().fast_dllm_byte_products()  # else two neighbours share one
    return (magnitudes.amax(-1) if own_range else magnitudes.sum(-1)).amax(-1, keepdim=True) / 127


def emulated(kind, inputs, weight, by_row=None):
    """The product as the kernel rounds it, in float64."""
    if kind == "bfloat16":
        return inputs.double() @ weight.bfloat16().double().T  # inputs stay in float32
    by_output, by_row = weight.abs().amax(1) / 127, steps_of(inputs) if by_row is None else by_row
    return (inputs / by_row).round().double() @ (weight / by_output[:, None]).round().double().T * by_row * by_output


class Layer:
    """One decoder layer of random weights, in the kernels and in plain torch arithmetic of the rounded operands."""

    def __init__(self, kind, width, *, query_heads=6, kv_heads=2, hidden=40, inner=56, bias=False, qk_norm=False):
        self.kind, self.width, self.heads, self.kv_heads = kind, width, query_heads, kv_heads
        self.ops = CpuOps(shape(query_heads, kv_heads, width), "causal", int8=kind == "int8")
        sizes = {
            "qkv": ((query_heads + 2 * kv_heads) * width, hidden),
            "out": (hidden, query_heads * width),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
        }
        self.weights = {name: torch.randn(size) / size[1] ** 0.5 for name, size in sizes.items()}
        self.biases = {name: torch.randn(size[0]) if bias else None for name, size in sizes.items()}
        self.norms = [torch.rand(size) + 0.5 for size in (hidden, hidden, width, width)]
        self.norms[2:] = self.norms[2:] if qk_norm else [None, None]

    def run(self, hidden, batch, cache, cos, sin):
        """What the kernels make of it."""
        linears = {name: self.ops.make_linear(weight, self.biases[name]) for name, weight in self.weights.items()}
        plan = self.ops.plan(batch, cache, cos, sin)
        return self.ops.layers([LayerWeights(**linears, **self.named_norms())], hidden.clone(), plan)

    def expected(self, hidden, batch, cache, cos, sin):
        """The same in torch, over the keys and values that the kernels left in the cache; and those of the batch."""
        attention_norm, mlp_norm, query_norm, key_norm = self.norms
        fused = self.project("qkv", F.rms_norm(hidden, attention_norm.shape, attention_norm, 1e-5))
        parts = fused.view(len(hidden), -1, self.width).split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        at = batch.positions
        queries, keys = (
            rotated(part if norm is None else F.rms_norm(part, norm.shape, norm, 1e-5), cos[at], sin[at])
            for part, norm in zip(parts, (query_norm, key_norm), strict=False)
        )
        hidden = hidden + self.project("out", self.attended(queries, batch, cache))
        gate, up = self.project("gate_up", F.rms_norm(hidden, mlp_norm.shape, mlp_norm, 1e-5)).chunk(2, dim=1)
        return (hidden + self.project("down", F.silu(gate) * up))[batch.read], keys, parts[2]

    def attended(self, queries, batch, cache):
        answers, share = [], self.heads // self.kv_heads
        queries = turned(queries, int8=cache.int8)
        if cache.int8:
            step = steps_of(queries)
            queries = (queries / step).round() * step
        slabs = unpacked(cache)
        for row, of_row in zip(batch.rows, queries.split([row.length for row in batch.rows]), strict=True):
            keys, values = (slab[row.slot, :, : row.visible_end] for slab in slabs)
            seen = torch.arange(row.visible_end) < torch.tensor(row.visible_ends("causal"))[:, None]
            keys, values = keys.repeat_interleave(share, 0), values.repeat_interleave(share, 0)
            answer = F.scaled_dot_product_attention(of_row.transpose(0, 1), keys, values, attn_mask=seen)
            answers.append(answer.transpose(0, 1).flatten(1))
        return torch.cat(answers)

    def project(self, name, x):
        product, bias = emulated(self.kind, x, self.weights[name]).float(), self.biases[name]
        return product if bias is None else product + bias

    def named_norms(self):
        names = ("attention_norm", "mlp_norm", "query_norm", "key_norm")
        return dict(zip(names, self.norms, strict=True))


def rotated(heads, cos, sin):
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


ROWS = [RowSpan(2, 70, 71, 71, 71, 8), RowSpan(0, 8, 28, 28, 28, 8), RowSpan(1, 190, 222, 224, 190, 32)]
"""A token after 70, a stretch of a clean block, and a noisy block whose end lies behind it; 53 positions."""


def angles(width):
    turns = torch.arange(224)[:, None] * torch.logspace(0, -3, width // 2)
    return turns.cos(), turns.sin()


def assert_near(ours, theirs, kind, *, int8_cache=False):
    """In int8 a rounding may fall to the other side of a tie, at few positions; the others differ as in bfloat16.

    Of an int8 cache the kernels also round the weights of the values, to 255 steps.
    """
    errors = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    assert errors.median() < ((0.02 if kind == "int8" else 0.01) if int8_cache else 1e-5)
    assert errors.max() < (0.1 if kind == "int8" else 0.02 if int8_cache else 1e-5)
