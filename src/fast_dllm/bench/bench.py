"""What every table is given."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.bench.findings import Findings
from fast_dllm.bench.machine import Peaks
from fast_dllm.bench.options import BenchOptions, Plan
from fast_dllm.bench.questions import Questions


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
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.screen, disable=not self.screen.is_terminal, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)
