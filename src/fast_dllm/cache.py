"""The KV cache: slots of preallocated memory, written in place, never copied as a whole."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """K/V of one layer: heads, and width of a key and of a value."""

    heads: int
    key_width: int
    value_width: int


class KVCache:
    """Slots, and the memory that they share: what does not depend on how a backbone lays K/V out.

    A slot holds one sequence: final tokens, then one provisional block. A forward over positions [a, b) writes
    there, and what it may look at is the mask's affair. So refining a sub-block overwrites its own part of the
    block (the sub-block cache), and committing a block is a forward with its final tokens: nothing moves.

    Attributes:
        layers: shape of each layer's K/V.
        slots: sequences held at once.
        max_length: tokens per slot.
    """

    def __init__(
        self, layers: Sequence[LayerShape], slabs: Sequence[Tensor], slots: int, max_length: int, *, per_row: int = 1
    ) -> None:
        """Take memory.

        Args:
            layers: shape of each layer's K/V.
            slabs: all of the memory, each [slots, kv_heads, rows, ..].
            slots: sequences held at once.
            max_length: tokens per slot.
            per_row: positions in a row of the slabs.
        """
        self.layers = layers
        self.slots = slots
        self.max_length = max_length
        self._slabs = slabs
        self._per_row = per_row
        self._free = list(range(slots - 1, -1, -1))

    @property
    def bytes_per_token(self) -> int:
        """What one token's K/V take, over all layers."""
        return sum(slab[0, :, 0].numel() * slab.element_size() for slab in self._slabs) // self._per_row

    @property
    def free_slots(self) -> int:
        """Slots that a new request may take."""
        return len(self._free)

    @property
    def available(self) -> Sequence[int]:
        """The free slots, lowest last."""
        return self._free

    def allocate(self, slot: int | None = None) -> int:
        """Take a slot.

        Args:
            slot: a free one; None takes the lowest.
        """
        if slot is None:
            return self._free.pop()
        self._free.remove(slot)
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back. What it holds stays until another request writes there."""
        self._free.append(slot)
        # Lowest first: rows that lie side by side are read without a gather.
        self._free.sort(reverse=True)

    @torch.inference_mode()
    def copy(self, source: int, destination: int, length: int) -> None:
        """Copy K/V of the first positions from slot to slot, in every layer.

        Args:
            source: slot to read.
            destination: another slot; what follows these positions in it is lost.
            length: positions from the start.
        """
        rows = -(-length // self._per_row)
        for slab in self._slabs:
            slab[destination, :, :rows] = slab[source, :, :rows]


class SlabCache(KVCache):
    """Per layer one K and one V tensor of shape [slots, kv_heads, max_length, head_dim], for any device.

    They are views of `flat_keys` and `flat_values`, [1, kv_heads, slots * max_length + spare, head_dim], in which
    position p of slot s is at s * max_length + p: for kernels that take all slots as one sequence.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        slots: int,
        max_length: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        spare: int = 0,
    ) -> None:
        """Allocate the slab.

        Args:
            layers: shape of each layer's K/V.
            slots: sequences held at once.
            max_length: tokens per slot, rounded up to whole blocks by the caller.
            dtype: of keys and values.
            device: where they live.
            spare: positions behind the last slot, which no slot sees.
        """

        def slab(heads: int, width: int) -> Tensor:
            # Zeros, not empty: masked keys are multiplied by 0, and 0 * NaN is NaN.
            return torch.zeros(1, heads, slots * max_length + spare, width, dtype=dtype, device=device)

        def by_slot(flat: Tensor) -> Tensor:
            return flat[0, :, : slots * max_length].view(len(flat[0]), slots, max_length, -1).transpose(0, 1)

        self.flat_keys = [slab(layer.heads, layer.key_width) for layer in layers]
        self.flat_values = [slab(layer.heads, layer.value_width) for layer in layers]
        self.keys = [by_slot(flat) for flat in self.flat_keys]
        self.values = [by_slot(flat) for flat in self.flat_values]
        super().__init__(layers, [*self.keys, *self.values], slots, max_length)

    def write(self, layer: int, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store K/V of a forward over T positions.

        Args:
            layer: index of the layer.
            slots: int64 [T], slot of each position.
            positions: int64 [T], place in the slot.
            keys: [T, kv_heads, head_dim].
            values: like `keys`.
        """
        self.keys[layer][slots, :, positions] = keys
        self.values[layer][slots, :, positions] = values

    def read(self, layer: int, rows: slice | Tensor, length: int) -> tuple[Tensor, Tensor]:
        """K/V of some slots, up to `length`.

        Args:
            layer: index of the layer.
            rows: a slice of slots (a view is returned) or int64 [R] (a gather).
            length: tokens from the start of each slot.

        Returns:
            Two tensors [R, kv_heads, length, head_dim].
        """
        return self.keys[layer][rows, :, :length], self.values[layer][rows, :, :length]
