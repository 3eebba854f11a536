"""What a data set comes to: how many tokens, how long, how much is lost, how much would be padding."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fast_dllm.data.chat import Sample


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens per sample.

    Attributes:
        shortest: of them.
        median: of them.
        percentile_90: nine samples of ten are no longer.
        longest: of them.
    """

    shortest: int
    median: int
    percentile_90: int
    longest: int


@dataclass(frozen=True, kw_only=True)
class DataStatistics:
    """What a data set comes to.

    Attributes:
        samples: those with a loss position, which are trained on.
        tokens: of these.
        response_tokens: loss positions of these.
        lengths: None where there is no sample.
        truncated: samples cut to the maximal length, dropped ones included.
        lost_ends: assistant turns whose end-of-turn token was cut off.
        dropped: samples without a loss position.
        skipped_rows: rows that could not be used.
    """

    samples: int
    tokens: int
    response_tokens: int
    lengths: Lengths | None
    truncated: int
    lost_ends: int
    dropped: int
    skipped_rows: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class Tally:
    """Adds samples up, and keeps no more of them than their lengths.

    Attributes:
        sizes: tokens of each sample that is trained on.
    """

    def __init__(self) -> None:
        """Nothing has been added yet."""
        self.sizes: list[int] = []
        self._response_tokens = self._truncated = self._lost_ends = self._dropped = 0

    def add(self, sample: Sample) -> None:
        """Count one sample."""
        self._truncated += sample.truncated
        self._lost_ends += sample.lost_ends
        if not any(sample.loss_mask):
            self._dropped += 1
            return
        self.sizes.append(len(sample.input_ids))
        self._response_tokens += sum(sample.loss_mask)

    def result(self, skipped_rows: int) -> DataStatistics:
        """What the samples come to.

        Args:
            skipped_rows: rows that could not be used.
        """
        return DataStatistics(
            samples=len(self.sizes),
            tokens=sum(self.sizes),
            response_tokens=self._response_tokens,
            lengths=_lengths(self.sizes) if self.sizes else None,
            truncated=self._truncated,
            lost_ends=self._lost_ends,
            dropped=self._dropped,
            skipped_rows=skipped_rows,
        )


def padding_share(tokens: Sequence[int], lengths: Sequence[int], order: Sequence[int], batch_size: int) -> float:
    """Share of positions that are padding when rows are trained in an order.

    Args:
        tokens: of each row, padding not counted.
        lengths: of each row, padded to whole blocks.
        order: indices of the rows, in the order they are trained; each batch is padded to its longest row.
        batch_size: rows of a batch.
    """
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    positions = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(tokens[row] for row in order) / positions


def _lengths(sizes: Sequence[int]) -> Lengths:
    ordered = sorted(sizes)

    def at(share: float) -> int:
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    return Lengths(shortest=ordered[0], median=at(0.5), percentile_90=at(0.9), longest=ordered[-1])
