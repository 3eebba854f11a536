"""The same questions to the same weights, one token at a time and in blocks."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import ONE_AT_A_TIME, DecodingConfig
from fast_dllm.data.tasks import Item, is_correct
from fast_dllm.progress import progress_columns
from fast_dllm.spread import spread
from fast_dllm.text import ChatText

Mode = Literal["ar", "diffusion"]
MODES: tuple[Mode, Mode] = ("ar", "diffusion")

DECODING: dict[Mode, DecodingConfig] = {
    "ar": DecodingConfig(**ONE_AT_A_TIME, max_new_tokens=128),
    "diffusion": DecodingConfig(max_new_tokens=128),
}


@dataclass(frozen=True)
class Answer:
    """What one mode made of one question.

    Attributes:
        text: the whole answer.
        correct: whether its last line is right.
        new_tokens: tokens of the answer, its end included.
        forwards: forwards of any kind.
        seconds: wall time.
        tokens: the text of each token.
        reveal_steps: per token, the forward that revealed it.
        confidences: per token, the model's confidence then.
    """

    text: str
    correct: bool
    new_tokens: int
    forwards: int
    seconds: float
    tokens: list[str]
    reveal_steps: list[int]
    confidences: list[float]

    @property
    def tokens_per_forward(self) -> float:
        """New tokens for each forward."""
        return self.new_tokens / self.forwards

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second."""
        return self.new_tokens / self.seconds

    @property
    def last_line(self) -> str:
        """Where the answer should be."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""


@dataclass(frozen=True)
class Pair:
    """One question and its two answers."""

    item: Item
    prompt_length: int
    ar: Answer
    diffusion: Answer

    def of(self, mode: Mode) -> Answer:
        """The answer of a mode."""
        return self.ar if mode == "ar" else self.diffusion

    def to_dict(self) -> dict[str, Any]:
        """The pair as the report holds it."""
        item = {"task": self.item.task, "question": self.item.question, "answer": self.item.answer}
        return {
            **item,
            "prompt_length": self.prompt_length,
            **{mode: {**asdict(self.of(mode)), "last_line": self.of(mode).last_line} for mode in MODES},
        }


def compare(model: BlockDiffusionLM, items: Sequence[Item], warm_up: Item, console: Console) -> list[Pair]:
    """Ask every question in both modes, and show the answers as they come.

    Args:
        model: an adapted model with a tokenizer.
        items: the questions.
        warm_up: asked first in both modes, and not counted.
        console: where the table goes.

    Returns:
        A pair of answers for each item.
    """
    table = _table()
    progress = Progress(*progress_columns(), console=console)
    task = progress.add_task("questions", total=len(items))
    pairs: list[Pair] = []
    with Live(Group(table, progress), console=console, refresh_per_second=4, transient=True):
        for pair in _ask_all(model, items, warm_up):
            pairs.append(pair)
            _add_row(table, len(pairs), pair)
            progress.advance(task)
    console.print(table)
    return pairs


def _ask_all(model: BlockDiffusionLM, items: Sequence[Item], warm_up: Item) -> Iterator[Pair]:
    for mode in MODES:
        _ask(model, warm_up, mode)
    text = ChatText(model.tokenizer)
    for index, item in enumerate(items):
        # Whatever drifts while the questions run (clock rate, other programs) meets both modes alike.
        order = MODES if index % 2 == 0 else MODES[::-1]
        answers = {mode: _ask(model, item, mode) for mode in order}
        yield Pair(item, len(text.prompt_ids(item.messages()[:1])), answers["ar"], answers["diffusion"])


def _ask(model: BlockDiffusionLM, item: Item, mode: Mode) -> Answer:
    tokenizer: Any = model.tokenizer
    reply = model.chat(item.messages()[:1], **DECODING[mode].to_dict())
    return Answer(
        text=reply.text,
        correct=is_correct(item, reply.text),
        new_tokens=reply.statistics.new_tokens,
        forwards=reply.statistics.forwards,
        seconds=reply.seconds,
        tokens=[str(tokenizer.decode([token])) for token in reply.ids],
        reveal_steps=reply.reveal_steps,
        confidences=[round(confidence, 4) for confidence in reply.confidences],
    )


def _table() -> Table:
    table = Table(title="One token at a time (AR) and block diffusion: same weights, same engine")
    table.add_column("#", justify="right", style="dim")
    table.add_column("question", ratio=4, min_width=12)
    table.add_column("AR", ratio=3, min_width=10)
    table.add_column("block diffusion", ratio=3, min_width=10)
    table.add_column("tokens/\nforward", justify="right")
    table.add_column("tokens/s\nAR", justify="right")
    table.add_column("tokens/s\nblock", justify="right")
    return table


def _add_row(table: Table, number: int, pair: Pair) -> None:
    table.add_row(
        str(number),
        Text(pair.item.question),
        _marked(pair.ar),
        _marked(pair.diffusion),
        f"{pair.diffusion.tokens_per_forward:.2f}",
        f"{pair.ar.tokens_per_s:.1f}",
        f"{pair.diffusion.tokens_per_s:.1f}",
    )


def _marked(answer: Answer) -> Text:
    mark = ("✓ ", "bold green") if answer.correct else ("✗ ", "bold red")
    line = answer.last_line
    return Text.assemble(mark, line if len(line) <= 60 else line[:59] + "…")


def totals(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The headline numbers of a comparison.

    Args:
        pairs: at least one.

    Returns:
        accuracy (share), tokens_per_forward (all tokens over all forwards), tokens_per_s (median over the
        questions) and tokens_per_s_quartiles, each by mode, and speedup, the ratio of the medians.
    """
    answers = {mode: [pair.of(mode) for pair in pairs] for mode in MODES}
    briefs = {mode: spread([answer.tokens_per_s for answer in answers[mode]]) for mode in MODES}
    medians = {mode: brief.median for mode, brief in briefs.items()}
    return {
        "accuracy": {mode: sum(a.correct for a in answers[mode]) / len(pairs) for mode in MODES},
        "tokens_per_forward": {
            mode: sum(a.new_tokens for a in answers[mode]) / sum(a.forwards for a in answers[mode]) for mode in MODES
        },
        "tokens_per_s": medians,
        "tokens_per_s_quartiles": {mode: [brief.low, brief.high] for mode, brief in briefs.items()},
        "speedup": medians["diffusion"] / medians["ar"],
    }


def print_totals(report: dict[str, Any], console: Console) -> None:
    """Print the headline numbers."""
    table = Table(title="Totals")
    for name in ("", "AR", "block diffusion"):
        table.add_column(name, justify="right" if name else "left")
    count = len(report["questions"])
    accuracy, per_forward = report["accuracy"], report["tokens_per_forward"]
    rates, halves = report["tokens_per_s"], report["tokens_per_s_quartiles"]
    table.add_row("right", *(f"{round(accuracy[mode] * count)} of {count}" for mode in MODES))
    table.add_row("tokens per forward", *(f"{per_forward[mode]:.2f}" for mode in MODES))
    table.add_row("tokens/s, median", *(f"{rates[mode]:.1f}" for mode in MODES))
    table.add_row("tokens/s, middle half", *(f"{halves[mode][0]:.1f} to {halves[mode][1]:.1f}" for mode in MODES))
    console.print(table)
    console.print(f"Speed of block diffusion over AR: [bold]{report['speedup']:.2f}x[/bold]")
