"""K/V as our CPU kernels keep them."""

import math

from fast_dllm.cache import KVCache, LayerShape
from fast_dllm.model.kernels import huge_pages

BLOCK = 16
"""Positions of a head that lie together: as in kernels/cached.h."""


class CpuCache(KVCache):
    """K/V in the order in which the kernels read them (`kernels/cached.h`), int8 with their scales beside them.

    Attributes:
        int8: 8 bits, with a bfloat16 scale per position and head for the key and one for the value; else bfloat16.
        data: uint8 [layers, slots, kv_heads, blocks, bytes of a block].
    """

    def __init__(self, layers: int, shape: LayerShape, slots: int, max_length: int, *, int8: bool) -> None:
        """Allocate.

        Args:
            layers: how many.
            shape: of each layer's K/V; a key is as wide as a value.
            slots: sequences held at once.
            max_length: tokens per slot.
            int8: 8 bits; else bfloat16.
        """
        self.int8 = int8
        size = (layers, slots, shape.heads, -(-max_length // BLOCK), _block_bytes(shape.key_width, int8=int8))
        self.data = huge_pages(math.prod(size)).view(size)
        super().__init__([shape] * layers, list(self.data), slots, max_length, per_row=BLOCK)


def _block_bytes(width: int, *, int8: bool) -> int:
    return 2 * BLOCK * (width + 2) if int8 else 2 * BLOCK * 2 * width
