"""The K/V cache of our CPU kernels (`kernels/cached.h`), filled and read in plain torch."""

import math

import torch

from fast_dllm.cache import LayerShape
from fast_dllm.model.cpu_cache import BLOCK, CpuCache


def random_cache(width, *, int8=False, kv_heads=2, slots=3, length=224):
    """One layer, whose every key and value is random."""
    cache = CpuCache(1, LayerShape(kv_heads, width, width), slots, length, int8=int8)
    if int8:
        cache.data.random_()
        scales = cache.data[..., 2 * BLOCK * width :]
        scales.copy_(torch.empty(*scales.shape[:-1], 2 * BLOCK).uniform_(0.005, 0.015).bfloat16().view(torch.uint8))
    else:
        cache.data.copy_(torch.randn(*cache.data.shape[:-1], 2 * BLOCK * width).bfloat16().view(torch.uint8))
    return cache


def unpacked(cache):
    """Keys and values of the first layer, float32 [slots, heads, length, E]; keys of int8 are still turned."""
    width = cache.layers[0].key_width
    data, size = cache.data[0], BLOCK * width
    if cache.int8:
        keys, values = data[..., :size].float() - 128, data[..., size : 2 * size].view(torch.int8).float()
        key_scales, value_scales = data[..., 2 * size :].contiguous().view(torch.bfloat16).float().split(BLOCK, dim=-1)
        per_unit = 4
    else:
        keys, values = data.view(torch.bfloat16).float().split(size, dim=-1)
        key_scales, value_scales = torch.ones(2, BLOCK)
        per_unit = 2
    keys = keys.unflatten(-1, (width // per_unit, BLOCK, per_unit)).transpose(-3, -2).flatten(-2)
    values = values.unflatten(-1, (BLOCK // per_unit, width, per_unit)).transpose(-2, -1).flatten(-3, -2)
    return (keys * key_scales[..., None]).flatten(-3, -2), (values * value_scales[..., None]).flatten(-3, -2)


def turned(heads, *, int8):
    """Queries or keys [.., E] as a cache has them: of int8, by the Walsh-Hadamard transform of each power of two."""
    if not int8:
        return heads
    size = heads.shape[-1] & -heads.shape[-1]
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (heads.unflatten(-1, (-1, size)) @ (matrix / math.sqrt(size))).flatten(-2)
