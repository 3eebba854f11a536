"""`fast-dllm eval` as a Python call."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.data.tasks import Item, held_out_items
from fast_dllm.errors import FastDLLMError
from fast_dllm.evaluation.box import TASKS_OF_THE_BOX, seen_by_the_box
from fast_dllm.evaluation.procedural import AUTOREGRESSIVE, Outcome, evaluate, ways_to_decode
from fast_dllm.evaluation.report import print_report, to_report


def run_eval(
    model: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    count: int = 200,
    thresholds: Sequence[float] = (0.9,),
    baseline: str | Path | None = None,
    dtype: str | None = None,
    max_batch: int = 16,
    max_new_tokens: int = 128,
    console: Console | None = None,
) -> dict[str, Any]:
    """Ask a model held-out procedural questions in several ways.

    Args:
        model: what `BlockDiffusionLM.from_pretrained` takes.
        tasks: names in `data.tasks.TASKS`; None takes those of the model in the box.
        count: held-out questions, over all tasks; none that the model in the box was ever trained on.
        thresholds: of block diffusion.
        baseline: a model whose AR answers are compared with; None compares with the model's own.
        dtype: as for `from_pretrained`.
        max_batch: questions answered at once.
        max_new_tokens: limit of an answer.
        console: where progress and the table go; None shows none.

    Returns:
        The report (see `report.to_report`).

    Raises:
        FastDLLMError: for an unknown task, or a model that cannot be asked.
    """
    items = held_out_questions(TASKS_OF_THE_BOX if tasks is None else tasks, count)
    lm = _load(model, dtype)
    ways = ways_to_decode(lm, thresholds, max_new_tokens)
    compared = None if baseline is None else _load(baseline, dtype)
    asked = (len(ways) + (compared is not None)) * len(items)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=console is None) as progress:
        bar = progress.add_task("", total=asked)

        def advance(name: str) -> None:
            progress.update(bar, description=name, advance=1)

        outcomes = evaluate(lm, items, ways, max_batch=max_batch, advance=advance)
        reference: Outcome = outcomes[AUTOREGRESSIVE]
        if compared is not None:
            only_ar = {f"AR of {baseline}": ways[AUTOREGRESSIVE]}
            of_baseline = evaluate(compared, items, only_ar, max_batch=max_batch, advance=advance)
            reference = next(iter(of_baseline.values()))
            outcomes = {**of_baseline, **outcomes}
    about = {"model": str(model), "dtype": dtype, "against": str(model if baseline is None else baseline)}
    report = to_report(outcomes, reference, **about)
    if console is not None:
        print_report(report, console)
    return report


def _load(model: str | Path, dtype: str | None) -> BlockDiffusionLM:
    lm = BlockDiffusionLM.from_pretrained(model, dtype=dtype)
    if lm.tokenizer is None:
        raise FastDLLMError(f"{model}: this checkpoint has no tokenizer, and questions are text")
    return lm


def held_out_questions(tasks: Sequence[str], count: int) -> list[Item]:
    """Questions for a test.

    Args:
        tasks: names in `data.tasks.TASKS`.
        count: how many, over all tasks; none of them was trained on by the model in the box.

    Raises:
        FastDLLMError: for an unknown task, or more questions than there are.
    """
    seen = seen_by_the_box()
    # Twice as many as asked for: some tasks are small, and half of their questions may have been trained on.
    held_out = held_out_items(tasks, 2 * count, seed=0)
    items = [item for item in held_out if item.question not in seen][:count]
    if len(items) < count:
        raise FastDLLMError(f"only {len(items)} held-out questions are left of these tasks; lower --items")
    return items
