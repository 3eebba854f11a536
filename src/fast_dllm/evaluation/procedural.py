"""Accuracy on procedural tasks, by way of decoding: the same questions, the same weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import DecodingConfig
from fast_dllm.data.tasks import Item, is_correct
from fast_dllm.decoding.events import Statistics
from fast_dllm.evaluation.intervals import Interval, paired_difference, share

AUTOREGRESSIVE = "AR"


@dataclass(frozen=True)
class Outcome:
    """What one way to decode made of the questions.

    Attributes:
        items: the questions.
        right: per question, whether its answer is right.
        statistics: per question.
    """

    items: Sequence[Item]
    right: Sequence[bool]
    statistics: Sequence[Statistics]

    @property
    def tokens_per_forward(self) -> float:
        """All new tokens over all forwards, prefill included."""
        return sum(self.statistics, start=Statistics()).tokens_per_forward

    def of(self, task: str) -> "Outcome":
        """The questions of one task."""
        kept = [i for i, item in enumerate(self.items) if item.task == task]
        return Outcome([self.items[i] for i in kept], [self.right[i] for i in kept], [self.statistics[i] for i in kept])

    def accuracy(self) -> Interval:
        """Share of right answers."""
        return share(sum(self.right), len(self.right))


def ways_to_decode(lm: BlockDiffusionLM, thresholds: Sequence[float], max_new_tokens: int) -> dict[str, DecodingConfig]:
    """AR, and block diffusion at each threshold: drafted and verified where the model allows it, and not verified.

    Args:
        lm: the model.
        thresholds: of block diffusion.
        max_new_tokens: limit of an answer.
    """
    ways = {AUTOREGRESSIVE: DecodingConfig(max_new_tokens=max_new_tokens, block_size=1, small_block_size=1)}
    verifies = DecodingConfig().verifies(lm.config)
    for verify in (True, False) if verifies else (False,):
        for threshold in thresholds:
            name = f"{'verified' if verify else 'diffusion'} {threshold:g}"
            ways[name] = DecodingConfig(max_new_tokens=max_new_tokens, threshold=threshold, verify=verify)
    return ways


def evaluate(
    lm: BlockDiffusionLM,
    items: Sequence[Item],
    ways: Mapping[str, DecodingConfig],
    *,
    max_batch: int = 16,
    advance: Callable[[str], None] = lambda _: None,
) -> dict[str, Outcome]:
    """Ask every question in every way.

    Args:
        lm: a model with a tokenizer.
        items: the questions.
        ways: settings by name.
        max_batch: questions answered at once; answers do not depend on it where arithmetic does not.
        advance: called with the name of the way after each answer.

    Returns:
        Outcomes by name, in the order of `ways`.
    """
    prompts = [item.messages()[:1] for item in items]
    outcomes = {}
    for name, decoding in ways.items():
        right, statistics = [], []
        for item, reply in zip(items, lm.answers(prompts, decoding, max_batch=max_batch), strict=True):
            right.append(is_correct(item, reply.text))
            statistics.append(reply.statistics)
            advance(name)
        outcomes[name] = Outcome(items, right, statistics)
    return outcomes


def against(outcome: Outcome, baseline: Outcome) -> Interval:
    """Accuracy minus that of a baseline on the same questions.

    Args:
        outcome: of one way.
        baseline: of another, or of another model.
    """
    return paired_difference(outcome.right, baseline.right)
