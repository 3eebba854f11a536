"""`fast-dllm eval`: accuracy and tokens per forward, one token at a time and in parallel."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fast_dllm.cli.options import BaseOption, CacheDtypeOption, DtypeOption, ModelArgument, listed
from fast_dllm.errors import FastDLLMError


def evaluate(
    model: ModelArgument = "smollm2",
    *,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="NAMES",
            help="Procedural tasks, or benchmarks of lm-evaluation-harness (gsm8k, ifeval, ...); by default the tasks "
            "of the model in the box.",
        ),
    ] = None,
    items: Annotated[
        int | None,
        typer.Option(
            "--items",
            min=1,
            help="Held-out procedural questions, over all tasks [default: 200], and questions of each benchmark "
            "[default: all].",
            show_default=False,
        ),
    ] = None,
    threshold: Annotated[str, typer.Option("--threshold", metavar="NUMBERS", help="Of block diffusion.")] = "0.7,0.9",
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Besides AR, only drafts that are verified, or only what is not [default: both, where the model can].",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="Compare with this model's AR answers, not the model's own."),
    ] = None,
    few_shot: Annotated[
        int | None,
        typer.Option(
            "--few-shot", min=0, help="Examples before each question of a benchmark; its own number if not given."
        ),
    ] = None,
    benchmark_data: Annotated[
        list[str] | None,
        typer.Option(
            "--benchmark-data",
            metavar="NAME=FILE",
            help="JSONL with a benchmark's questions, or with its few-shot examples (NAME:few-shot=FILE), in place of "
            "the hub's; may be given several times.",
        ),
    ] = None,
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    base: BaseOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions answered at once.")] = 16,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            min=1,
            help="Limit of an answer [default: 128, and a benchmark's own].",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the report as JSON, after every way that is done."),
    ] = None,
) -> None:
    """Ask a model questions, and count.

    Every threshold answers the same questions, drafted and verified where the model allows it, and not verified.
    Prints accuracy with its 95% interval, the paired difference to AR, tokens per forward, and one JSON object on the
    last line.
    """
    thresholds = listed("threshold", threshold, float)
    files = _named_files(benchmark_data or [])
    from rich.console import Console

    from fast_dllm.evaluation.run import run_eval

    console = Console() if sys.stdout.isatty() else Console(width=160)
    report = run_eval(
        model,
        tasks=None if task is None else listed("task", task, str),
        count=items,
        thresholds=thresholds,
        verify=verify,
        baseline=against,
        dtype=dtype,
        cache_dtype=cache_dtype,
        max_batch=batch_size,
        max_new_tokens=max_new_tokens,
        few_shot=few_shot,
        benchmark_data=files,
        base=base,
        out=out,
        console=console,
    )
    print(json.dumps(report))


def _named_files(options: list[str]) -> dict[str, str]:
    """The files in NAME=FILE, by name."""
    files = {}
    for option in options:
        name, equals, file = option.partition("=")
        if not (name and equals and file):
            raise FastDLLMError(f"--benchmark-data {option}: must be NAME=FILE")
        files[name] = file
    return files
