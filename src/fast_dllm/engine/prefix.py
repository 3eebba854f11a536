"""Which slot holds the K/V of which tokens, so that a known beginning need not be computed again.

Bookkeeping only: no K/V are moved here.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from fast_dllm.config import ContextAttention
from fast_dllm.decoding.state import DecodeState

_CAUSAL_CHUNK = 16
"""Tokens hashed together where K/V do not depend on blocks."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes, and what of its beginning is there already.

    Attributes:
        slot: a free one.
        source: the slot that holds the K/V of the beginning; `slot` itself when they need no copy.
        length: positions of the beginning; 0 for none.
    """

    slot: int
    source: int
    length: int


@dataclass(slots=True)
class _Held:
    """What a slot holds: ids of whole chunks, and per chunk a hash of all ids up to its end."""

    layout: int
    ids: list[int] = field(default_factory=list)
    chain: list[int] = field(default_factory=list)


class PrefixIndex:
    """The clean, final K/V of all slots, found by a hash chain over their ids.

    A slot keeps what it holds when its request has left, until it is the least recently used one and needed.
    """

    def __init__(self, attention: ContextAttention) -> None:
        """Start with nothing held.

        Args:
            attention: of the checkpoint. K/V depend on the block size unless it is "causal".
        """
        self._causal = attention == "causal"
        self._held: dict[int, _Held] = {}  # least recently used first
        self._holders: dict[int, set[int]] = {}

    def _layout(self, state: DecodeState) -> tuple[int, int]:
        """What K/V depend on besides ids, and tokens per chunk."""
        return (0, _CAUSAL_CHUNK) if self._causal else (state.block_size, state.block_size)

    def hold(self, slot: int, state: DecodeState) -> None:
        """Note what a slot holds by now.

        Args:
            slot: of the cache.
            state: of the request that has the slot; what it has committed is taken in.
        """
        layout, size = self._layout(state)
        if state.committed < size:
            return
        held = self._held.setdefault(slot, _Held(layout))
        for start in range(len(held.ids), state.committed - size + 1, size):
            chunk = state.settled_ids(start, start + size)
            held.ids += chunk
            held.chain.append(_link(held.chain[-1] if held.chain else layout, chunk))
            self._holders.setdefault(held.chain[-1], set()).add(slot)

    def retain(self, slot: int, state: DecodeState) -> None:
        """Note what a slot holds when its request leaves it; it is now the most recently used."""
        self.hold(slot, state)
        self._touch(slot)

    def place(self, state: DecodeState, free: Collection[int]) -> Placement:
        """Choose a slot for a request, and forget what it will overwrite.

        The slot that holds the longest beginning is taken as it is if nothing else in it is lost by that, or if it
        would be the next to be given up anyway; else it is copied from.

        Args:
            state: of the request, which has committed nothing.
            free: slots to choose from; at least one.
        """
        length, holders = self._longest(state)
        slot = self._unneeded(free)
        whole = [holder for holder in holders if holder in free and len(self._held[holder].ids) == length]
        source = slot
        if whole:
            slot = source = whole[0]
        elif holders and slot not in holders:
            source = holders[0]
            self._touch(source)
        self._truncate(slot, length if slot in holders else 0, self._layout(state)[1])
        return Placement(slot, source, length if holders else 0)

    def _longest(self, state: DecodeState) -> tuple[int, list[int]]:
        """Tokens of the longest beginning that some slot holds, and the slots that do."""
        ids = state.prefill_ids()
        layout, size = self._layout(state)
        link, length = layout, 0
        found: set[int] = set()
        for end in range(size, len(ids) + 1, size):
            link = _link(link, ids[end - size : end])
            holders = self._holders.get(link)
            if holders is None:
                break
            found, length = holders, end
        # Hashes may collide, ids do not.
        beginning = ids[:length]
        return length, [
            slot
            for slot in sorted(found)
            if self._held[slot].layout == layout and self._held[slot].ids[:length] == beginning
        ]

    def _unneeded(self, free: Collection[int]) -> int:
        """The lowest free slot that holds nothing, else the least recently used."""
        unused = [slot for slot in free if slot not in self._held]
        return min(unused) if unused else next(slot for slot in self._held if slot in free)

    def _touch(self, slot: int) -> None:
        if slot in self._held:
            self._held[slot] = self._held.pop(slot)

    def _truncate(self, slot: int, length: int, size: int) -> None:
        """Forget what a slot holds from `length` on."""
        held = self._held.get(slot)
        if held is None:
            return
        for link in held.chain[length // size :]:
            holders = self._holders[link]
            holders.discard(slot)
            if not holders:
                del self._holders[link]
        if length:
            del held.ids[length:], held.chain[length // size :]
        else:
            del self._held[slot]


def _link(previous: int, chunk: Sequence[int]) -> int:
    return hash((previous, *chunk))
