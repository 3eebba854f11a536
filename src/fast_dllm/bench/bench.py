"""What every table is given."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.bench.findings import Findings
from fast_dllm.bench.options import BenchOptions, Plan
from fast_dllm.bench.peaks import Peaks
from fast_dllm.bench.questions import Questions
from fast_dllm.bench.timing import PAUSE_S, Key, Result, Timed, alternate
from fast_dllm.progress import progress_columns

Part = tuple[str, Callable[[], None]]
"""A name, and what it measures in some minutes: a long run goes on with the next one that it has not done."""


@dataclass(frozen=True)
class Bench:
    """A run on its way.

    Attributes:
        options: what was asked.
        plan: what it comes to.
        models: by dtype, in the order asked; one at least.
        questions: as the models' tokenizer writes them.
        findings: where results go.
        peaks: of this machine.
        screen: where progress is shown.
    """

    options: BenchOptions
    plan: Plan
    models: Mapping[str, BlockDiffusionLM]
    questions: Questions
    findings: Findings
    peaks: Peaks
    screen: Console

    @property
    def threads(self) -> int:
        """CPU threads of every contestant."""
        return self.peaks.threads

    def lengths(self, what: str, wanted: Sequence[int], room: int) -> list[int]:
        """Context lengths that the model can take, those too long shortened to the longest possible.

        Args:
            what: is measured at them, for the findings.
            wanted: in tokens.
            room: positions needed behind each.
        """
        longest = next(iter(self.models.values())).backbone.max_length
        most = None if longest is None else max(longest - room, 1)
        for length in wanted:
            if most is not None and length > most:
                self.findings.skip(f"{what} at {length} tokens", f"measured at {most}: the model ends at {longest}")
        return list(dict.fromkeys(length if most is None else min(length, most) for length in wanted))

    @contextmanager
    def calls(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A progress bar on the screen, if that is a terminal.

        Args:
            what: is being measured.
            total: calls to come, those that warm up included.

        Yields:
            What to call after each.
        """
        shown = self.screen.is_terminal
        with Progress(*progress_columns(), console=self.screen, disable=not shown, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)

    def race(
        self, what: str, contestants: Mapping[Key, Callable[[int], Result]], repetitions: int, pause_s: float = PAUSE_S
    ) -> dict[Key, list[Timed[Result]]]:
        """`timing.alternate` with a progress bar.

        Args:
            what: is being measured.
            contestants: as for `alternate`.
            repetitions: 1 or more.
            pause_s: rest before each call, in seconds.
        """
        with self.calls(what, len(contestants) * (repetitions + 1)) as advance:
            return alternate(contestants, repetitions, on_call=advance, pause_s=pause_s)
