"""Outcomes as tables, and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from fast_dllm.evaluation.intervals import Interval
from fast_dllm.evaluation.outcome import Outcome

_MOST_TASKS_SHOWN = 8


def to_report(outcomes: Mapping[str, Outcome], baseline: Outcome, **about: Any) -> dict[str, Any]:
    """All numbers.

    Args:
        outcomes: by way of decoding.
        baseline: what each is compared with, on the same questions.
        **about: what else the report should say: model, dtype, settings.
    """
    tasks = dict.fromkeys(baseline.tasks)
    return {
        **about,
        "questions": len(baseline.right),
        "ways": {
            name: _numbers(outcome, baseline)
            | {"tasks": {task: _numbers_of_task(outcome, baseline, task) for task in tasks}}
            for name, outcome in outcomes.items()
        },
    }


def _numbers(outcome: Outcome, baseline: Outcome) -> dict[str, Any]:
    return {
        "accuracy": asdict(outcome.accuracy()),
        "over_baseline": asdict(outcome.over(baseline)),
        "tokens_per_forward": outcome.total.tokens_per_forward,
        "new_tokens": outcome.total.new_tokens,
        "cut_answers": sum(outcome.cut),
    }


def _numbers_of_task(outcome: Outcome, baseline: Outcome, task: str) -> dict[str, Any]:
    part = outcome.of(task)
    reference = part if baseline is outcome else baseline.of(task)
    metrics = {"metrics": dict(outcome.metrics[task])} if task in outcome.metrics else {}
    return {"questions": len(part.right), **_numbers(part, reference), **metrics}


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print one row per way of decoding, and a column per task; of each benchmark with scorers of its own, a table."""
    ways = report["ways"]
    tasks = list(next(iter(ways.values()))["tasks"])
    shown = tasks if len(tasks) <= _MOST_TASKS_SHOWN else []
    if len(tasks) > 1 or "metrics" not in next(iter(ways.values()))["tasks"][tasks[0]]:
        columns = {
            name: {task: f"{100 * numbers['tasks'][task]['accuracy']['value']:.0f}" for task in shown}
            for name, numbers in ways.items()
        }
        console.print(_table(f"{report['questions']} questions", ways, columns))
    for task in shown:
        of_task = {name: numbers["tasks"][task] for name, numbers in ways.items()}
        metrics = {name: _other_metrics(numbers) for name, numbers in of_task.items() if "metrics" in numbers}
        if metrics:
            count = next(iter(of_task.values()))["questions"]
            console.print(_table(f"{task}, {count} questions", of_task, metrics))


def _other_metrics(numbers: Mapping[str, Any]) -> dict[str, str]:
    """All but the first, which is the accuracy."""
    return {
        metric.removesuffix(",none"): f"{100 * value:.1f}" for metric, value in list(numbers["metrics"].items())[1:]
    }


def _table(title: str, ways: Mapping[str, Any], columns: Mapping[str, Mapping[str, str]]) -> Table:
    """A row per way.

    Args:
        title: what was asked.
        ways: numbers by way.
        columns: further columns by way, the same for each.
    """
    table = Table(
        title=f"{title}; right in % (95% interval), tokens per forward",
        caption="cut: answers that reached their limit of tokens",
    )
    table.add_column("")
    further = [name.replace("_", "\n").replace(",", "\n") for name in next(iter(columns.values()))]
    for name in ("right", "over AR, paired", "tokens/\nforward", "tokens", "cut", *further):
        table.add_column(name, justify="right")
    for name, numbers in ways.items():
        table.add_row(
            name,
            _percent(numbers["accuracy"]),
            _percent(numbers["over_baseline"], signed=True),
            f"{numbers['tokens_per_forward']:.2f}",
            str(numbers["new_tokens"]),
            str(numbers["cut_answers"]),
            *columns[name].values(),
        )
    return table


def _percent(numbers: Mapping[str, float], *, signed: bool = False) -> str:
    interval = Interval(**numbers)
    sign = "+" if signed else ""
    value, low, high = (f"{100 * x:{sign}.1f}" for x in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})"
