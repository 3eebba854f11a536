"""Questions with a judge, asked in several ways to decode: the same questions, the same weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import DecodingConfig
from fast_dllm.evaluation.outcome import Outcome


class Benchmark(Protocol):
    """Questions, and who says whether they were answered right."""

    @property
    def name(self) -> str:
        """How it is called in errors."""
        ...

    @property
    def count(self) -> int:
        """How many questions."""
        ...

    @property
    def decodes(self) -> bool:
        """Whether answers are decoded; otherwise the model says how likely given ones are, in one way only."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What else it takes to ask the same again, for a report."""
        ...

    def ask(
        self, lm: BlockDiffusionLM, decoding: DecodingConfig, *, max_batch: int, advance: Callable[[], None]
    ) -> Outcome:
        """Ask every question.

        Args:
            lm: a model with a tokenizer.
            decoding: the way to decode; the benchmark sets the limit of an answer.
            max_batch: questions answered at once; answers do not depend on it where arithmetic does not.
            advance: called once for each question that has been answered.

        Returns:
            One entry per question, always in the same order.
        """
        ...


def evaluate(
    lm: BlockDiffusionLM,
    benchmarks: Sequence[Benchmark],
    ways: Mapping[str, DecodingConfig],
    *,
    max_batch: int = 16,
    advance: Callable[[str], None] = lambda _: None,
) -> dict[str, Outcome]:
    """Ask every question in every way.

    Args:
        lm: a model with a tokenizer.
        benchmarks: the questions.
        ways: settings by name.
        max_batch: questions answered at once.
        advance: called with the name of the way after each answer.

    Returns:
        Outcomes by name, in the order of `ways`.
    """

    def ask(name: str, decoding: DecodingConfig) -> Outcome:
        answered = [
            benchmark.ask(lm, decoding, max_batch=max_batch, advance=lambda: advance(name)) for benchmark in benchmarks
        ]
        return Outcome.joined(answered)

    return {name: ask(name, decoding) for name, decoding in ways.items()}
