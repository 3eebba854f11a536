"""Outcomes as a table, and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from fast_dllm.evaluation.intervals import Interval
from fast_dllm.evaluation.procedural import Outcome, against


def to_report(outcomes: Mapping[str, Outcome], baseline: Outcome, **about: Any) -> dict[str, Any]:
    """All numbers.

    Args:
        outcomes: by way of decoding.
        baseline: what each is compared with, on the same questions.
        **about: what else the report should say: model, dtype.
    """
    return {
        **about,
        "questions": len(baseline.items),
        "ways": {name: _numbers(outcome, baseline) for name, outcome in outcomes.items()},
    }


def _numbers(outcome: Outcome, baseline: Outcome) -> dict[str, Any]:
    tasks = dict.fromkeys(item.task for item in outcome.items)
    return {
        "accuracy": asdict(outcome.accuracy()),
        "over_baseline": asdict(against(outcome, baseline)),
        "tokens_per_forward": outcome.tokens_per_forward,
        "new_tokens": sum(statistics.new_tokens for statistics in outcome.statistics),
        "tasks": {
            task: {
                "accuracy": asdict(outcome.of(task).accuracy()),
                "tokens_per_forward": outcome.of(task).tokens_per_forward,
                "questions": len(outcome.of(task).items),
            }
            for task in tasks
        },
    }


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print one row per way of decoding, and a column per task."""
    ways = report["ways"]
    tasks = list(next(iter(ways.values()))["tasks"])
    table = Table(title=f"{report['questions']} held-out questions; right in % (95% interval), tokens per forward")
    table.add_column("")
    for name in ("all tasks", "over AR, paired", "tokens/\nforward", *(task.replace("_", "\n") for task in tasks)):
        table.add_column(name, justify="right")
    for name, numbers in ways.items():
        by_task = [f"{100 * numbers['tasks'][task]['accuracy']['value']:.0f}" for task in tasks]
        table.add_row(
            name,
            _percent(numbers["accuracy"]),
            _percent(numbers["over_baseline"], signed=True),
            f"{numbers['tokens_per_forward']:.2f}",
            *by_task,
        )
    console.print(table)


def _percent(numbers: Mapping[str, float], *, signed: bool = False) -> str:
    interval = Interval(**numbers)
    sign = "+" if signed else ""
    value, low, high = (f"{100 * x:{sign}.1f}" for x in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})"
