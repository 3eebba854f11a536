"""What the engine needs of a model, and nothing about how it is computed.

Shape legend: R rows, T positions of all rows together, N logits wanted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from fast_dllm.cache import KVCache
from fast_dllm.config import ContextAttention
from fast_dllm.masks import visible_ends


@dataclass(frozen=True, slots=True)
class RowSpan:
    """What one row of a forward runs over, and may look at.

    Attributes:
        slot: of the cache.
        start: first position.
        end: end of the positions.
        visible_end: keys the row may look at end here.
        noisy_from: start of the row's noisy block; `visible_end` in a clean forward.
        block_size: D of the row.
    """

    slot: int
    start: int
    end: int
    visible_end: int
    noisy_from: int
    block_size: int

    @property
    def length(self) -> int:
        """Positions of the row."""
        return self.end - self.start

    def visible_ends(self, attention: ContextAttention) -> list[int]:
        """For each position, the end of the keys it sees (`masks.visible_ends`)."""
        return visible_ends(
            self.start,
            self.end,
            visible_end=self.visible_end,
            noisy_from=self.noisy_from,
            block_size=self.block_size,
            attention=attention,
        )


@dataclass(frozen=True)
class ForwardBatch:
    """One forward over rows of any lengths, their positions laid end to end.

    Attributes:
        rows: in order of (length, slot), so that those which can share an attention call stand together.
        input_ids: int64 [T].
        positions: int64 [T].
        slots: int64 [T].
        read: int64 [N], ascending; places in [0, T) of the hidden states whose logits are wanted.
    """

    rows: tuple[RowSpan, ...]
    input_ids: Tensor
    positions: Tensor
    slots: Tensor
    read: Tensor

    @classmethod
    def build(
        cls, rows: Sequence[RowSpan], ids: Sequence[int], read: Sequence[int], device: torch.device | str = "cpu"
    ) -> Self:
        """Lay the rows out.

        Args:
            rows: in order of (length, slot).
            ids: token ids of all rows, end to end.
            read: places in `ids` whose logits are wanted, ascending.
            device: of the model.
        """

        def tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)

        return cls(
            rows=tuple(rows),
            input_ids=tensor(ids),
            positions=tensor([position for row in rows for position in range(row.start, row.end)]),
            slots=tensor([row.slot for row in rows for _ in range(row.length)]),
            read=tensor(read),
        )

    def runs(self, *, side_by_side: bool) -> Iterator[tuple[int, int, int]]:
        """Runs of rows of one length.

        Args:
            side_by_side: end a run where slots do not follow one another.

        Returns:
            (first row, end of rows, place of the first position) of each.
        """
        first = offset = 0
        for number, row in enumerate(self.rows):
            ends_here = number + 1 == len(self.rows)
            if not ends_here:
                after = self.rows[number + 1]
                ends_here = after.length != row.length or (side_by_side and after.slot != row.slot + 1)
            if ends_here:
                yield first, number + 1, offset
                offset += (number + 1 - first) * row.length
                first = number + 1

    def mask(self, first: int, last: int, attention: ContextAttention) -> Tensor | None:
        """Who sees whom in rows [first, last), which have one length.

        Args:
            first: number of a row.
            last: end of the rows.
            attention: context attention of the checkpoint.

        Returns:
            bool [R, 1, Q, K], K the largest `visible_end`; None where everything is seen.
        """
        ends = self.key_ends(first, last, attention)
        if ends is None:
            return None
        keys = max(row.visible_end for row in self.rows[first:last])
        return torch.arange(keys, device=ends.device) < ends[:, None, :, None]

    def key_ends(self, first: int, last: int, attention: ContextAttention) -> Tensor | None:
        """Where the keys end that each position of rows [first, last) sees.

        Args:
            first: number of a row.
            last: end of the rows, which have one length.
            attention: context attention of the checkpoint.

        Returns:
            int64 [R, Q]; None where all of them end at the largest `visible_end`.
        """
        rows = self.rows[first:last]
        keys = max(row.visible_end for row in rows)
        ends = [row.visible_ends(attention) for row in rows]
        if all(end == keys for row in ends for end in row):
            return None
        return torch.tensor(ends).to(self.positions.device, non_blocking=True)


DRAFTS_ON_CPU = 16
"""`Backbone.draft_budget` of a CPU: on two cores with AVX-512, the least at which one request still drafts whole
sub-blocks; what more at once gain is in docs/bench/batches.json."""

DRAFTS_ON_OLDER_CPU = 6
"""The same in int8 on a CPU without an instruction that sums products of bytes, where each position costs more."""


Likeliest = Callable[[Tensor, int | None], tuple[Tensor, Tensor]]


class Backbone(Protocol):
    """A causal language model run over our cache."""

    max_length: int | None
    """Longest sequence the model can take, in tokens; None if it names none."""

    vocabulary: int
    """Rows of the embedding: ids below it can be run."""

    draft_budget: int | None
    """Masks that a forward may look at, over all rows that verify their drafts, before it pays to draft less; None for
    no limit. A few masks cost next to nothing while a forward takes as long as reading the weights; beyond that each
    costs what a token of another row would."""

    likeliest: Likeliest | None
    """Of each row of logits [N, V], the likeliest token other than a banned one, int64 [N], and its probability,
    float32 [N], that of the banned token in the denominator. None where there is no better way than torch's."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    def new_cache(self, slots: int, max_length: int) -> KVCache:
        """Allocate memory for K/V of this model."""
        ...

    def forward(self, batch: ForwardBatch, cache: Any) -> Tensor:
        """Run the rows, write their K/V to a cache that `new_cache` made, and return the wanted logits.

        Returns:
            float32 (or wider) [N, vocabulary].
        """
        ...
