"""What came of asking questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from fast_dllm.decoding.events import Statistics
from fast_dllm.evaluation.intervals import Interval, paired_difference, share


@dataclass(frozen=True)
class Outcome:
    """What one way to decode made of some questions.

    Attributes:
        tasks: per question, the task that it belongs to.
        right: per question, whether its answer is right.
        statistics: per question, of its decoding.
        cut: per question, whether its answer reached the limit of new tokens; nothing of it may have been scored.
        metrics: by task, what a benchmark's own scorers say; the first says the same as `right`.
    """

    tasks: Sequence[str]
    right: Sequence[bool]
    statistics: Sequence[Statistics]
    cut: Sequence[bool]
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def total(self) -> Statistics:
        """The statistics added up."""
        return sum(self.statistics, start=Statistics())

    def of(self, task: str) -> "Outcome":
        """The questions of one task."""
        kept = [i for i, name in enumerate(self.tasks) if name == task]
        right, statistics = [self.right[i] for i in kept], [self.statistics[i] for i in kept]
        return Outcome([task] * len(kept), right, statistics, [self.cut[i] for i in kept])

    def accuracy(self) -> Interval:
        """Share of right answers."""
        return share(sum(self.right), len(self.right))

    def over(self, baseline: "Outcome") -> Interval:
        """Accuracy minus that of a baseline on the same questions.

        Args:
            baseline: of another way, or of another model; or this very outcome, which is no better than itself.
        """
        if baseline is self:
            return Interval(0.0, 0.0, 0.0)
        return paired_difference(self.right, baseline.right)

    @classmethod
    def joined(cls, outcomes: Sequence["Outcome"]) -> Self:
        """The questions of several outcomes, in their order."""
        return cls(
            [task for outcome in outcomes for task in outcome.tasks],
            [right for outcome in outcomes for right in outcome.right],
            [statistics for outcome in outcomes for statistics in outcome.statistics],
            [cut for outcome in outcomes for cut in outcome.cut],
            {task: metrics for outcome in outcomes for task, metrics in outcome.metrics.items()},
        )
