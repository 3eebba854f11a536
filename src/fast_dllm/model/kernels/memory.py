"""Memory for packed weights, in huge pages where the system has them."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_PAGE = 2 << 20
_BLOCK = 32 * _PAGE
_LINE = 64


class WeightMemory:
    """Hands out pieces of large blocks, one after another.

    A forward reads all weights once. In pages of 4 KiB it would wait for the address of each: huge pages raise the
    bandwidth by a seventh to a third. Most matrices are smaller than a huge page, hence the blocks.
    """

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def take(self, count: int) -> Tensor:
        """Memory of some bytes, uint8 [count], from the beginning of a cache line on."""
        if count > len(self._rest):
            self._rest = huge_pages(max(count + _LINE, _BLOCK))
        taken, self._rest = self._rest[:count], self._rest[-(-count // _LINE) * _LINE :]
        return taken


def huge_pages(count: int) -> Tensor:
    """Zeros, uint8 [count], from the beginning of a huge page on where the system has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, dtype=torch.uint8)
    memory = mmap.mmap(-1, count + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # libc knows the name, but the kernel was built without
        memory.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(memory, dtype=torch.uint8)
    first = -block.data_ptr() % _PAGE
    return block[first : first + count]
