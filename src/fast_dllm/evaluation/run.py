"""`fast-dllm eval` as a Python call."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import ONE_AT_A_TIME, CacheDtype, DecodingConfig, TaskItems
from fast_dllm.data.tasks import TASKS
from fast_dllm.errors import FastDLLMError
from fast_dllm.evaluation.benchmark import Benchmark, evaluate
from fast_dllm.evaluation.box import TASKS_OF_THE_BOX, unseen_questions
from fast_dllm.evaluation.harness_tasks import load_benchmarks
from fast_dllm.evaluation.outcome import Outcome
from fast_dllm.evaluation.procedural import MAX_NEW_TOKENS, ProceduralBenchmark
from fast_dllm.evaluation.report import print_report, to_report
from fast_dllm.evaluation.ways import AR, ways_to_decode
from fast_dllm.files import write_whole
from fast_dllm.machine import provenance
from fast_dllm.progress import progress_columns

PROCEDURAL_QUESTIONS = 200


def run_eval(
    model: str | Path,
    *,
    tasks: Sequence[str] | None = None,
    count: int | None = None,
    thresholds: Sequence[float] = (0.9,),
    verify: bool | None = None,
    baseline: str | Path | None = None,
    dtype: str | None = None,
    cache_dtype: CacheDtype | None = None,
    max_batch: int = 16,
    max_new_tokens: int | None = None,
    few_shot: int | None = None,
    benchmark_data: Mapping[str, str] | None = None,
    base: str | Path | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Ask a model questions in several ways.

    Args:
        model: what `BlockDiffusionLM.from_pretrained` takes.
        tasks: names in `data.tasks.TASKS`, of which only held-out questions are asked, and tasks of
            lm-evaluation-harness; None takes the procedural tasks of the model in the box.
        count: procedural questions, over all tasks (None: 200; none that the models, or a recipe of this repository,
            were trained on), and of each task of lm-evaluation-harness (None: all).
        thresholds: of block diffusion.
        verify: see `ways_to_decode`.
        baseline: a model whose AR answers are compared with; None compares with the model's own.
        dtype: as for `from_pretrained`.
        cache_dtype: as for `from_pretrained`.
        max_batch: questions answered at once.
        max_new_tokens: limit of an answer; None takes 128 for procedural questions, and each other task's own.
        few_shot: see `harness_tasks.load_benchmarks`.
        benchmark_data: see `harness_tasks.load_benchmarks`.
        base: where the base of `model` is, an adapter, if not where it was.
        out: gets the report as JSON, after every way that is done.
        console: where progress and the table go; None shows none.

    Returns:
        The report (see `report.to_report`).

    Raises:
        FastDLLMError: for an unknown task, or a model that cannot be asked.
    """
    names = TASKS_OF_THE_BOX if tasks is None else tasks
    if not names:
        raise FastDLLMError("no tasks given; leave --task out, or name some")
    others = load_benchmarks(
        [name for name in names if name not in TASKS],
        data=benchmark_data,
        few_shot=few_shot,
        limit=count,
        max_new_tokens=max_new_tokens,
    )
    lm = _load(model, dtype, cache_dtype, base)
    other = None if baseline is None else _load(baseline, dtype, cache_dtype)
    trained_on = [entry for one in (lm, other) if one is not None for entry in one.checkpoint.trained_on]
    benchmarks = [*_procedural(names, count, max_new_tokens, trained_on), *others]
    asked = [(lm, name, decoding) for name, decoding in _ways(lm, benchmarks, thresholds, verify).items()]
    if other is not None:
        asked.insert(0, (other, f"AR of {baseline}", DecodingConfig(**ONE_AT_A_TIME)))
    elif not asked or asked[0][1] != AR:
        raise FastDLLMError(
            f"{model}: has no autoregressive answers to compare with; name a baseline (--against MODEL)"
        )
    about = {
        **provenance(),
        "model": str(model),
        "dtype": dtype,
        "cache_dtype": getattr(lm.backbone, "cache_dtype", None),
        "max_batch": max_batch,
        "against": str(model if baseline is None else baseline),
        "settings": {benchmark.name: benchmark.settings for benchmark in benchmarks},
    }
    report: dict[str, Any] = {}
    for outcomes in _ask(asked, benchmarks, max_batch, console):
        report = to_report(outcomes, outcomes[asked[0][1]], **about)
        if out is not None:
            write_whole(out, json.dumps(report, indent=1) + "\n")
    if console is not None:
        print_report(report, console)
    return report


def _ask(
    asked: Sequence[tuple[BlockDiffusionLM, str, DecodingConfig]],
    benchmarks: Sequence[Benchmark],
    max_batch: int,
    console: Console | None,
) -> Iterator[dict[str, Outcome]]:
    """What models make of the questions, by way; yields after each (model, name of the way, its settings)."""
    answers = len(asked) * sum(benchmark.count for benchmark in benchmarks)
    outcomes: dict[str, Outcome] = {}
    with Progress(*progress_columns(), console=console, disable=console is None) as progress:
        bar = progress.add_task("", total=answers)

        def advance(name: str) -> None:
            progress.update(bar, description=name, advance=1)

        for lm, name, decoding in asked:
            outcomes |= evaluate(lm, benchmarks, {name: decoding}, max_batch=max_batch, advance=advance)
            yield outcomes


def _procedural(
    names: Sequence[str], count: int | None, max_new_tokens: int | None, trained_on: Sequence[TaskItems]
) -> list[Benchmark]:
    tasks = [name for name in names if name in TASKS]
    if not tasks:
        return []
    items = unseen_questions(tasks, PROCEDURAL_QUESTIONS if count is None else count, trained_on)
    return [ProceduralBenchmark(items, MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens)]


def _load(
    model: str | Path, dtype: str | None, cache_dtype: CacheDtype | None, base: str | Path | None = None
) -> BlockDiffusionLM:
    lm = BlockDiffusionLM.from_pretrained(model, dtype=dtype, cache_dtype=cache_dtype, base=base)
    if lm.tokenizer is None:
        raise FastDLLMError(f"{model}: this checkpoint has no tokenizer, and questions are text")
    lm.backbone.draft_budget = None  # what a row drafts is not to hang on how many are asked at once
    return lm


def _ways(
    lm: BlockDiffusionLM, benchmarks: Sequence[Benchmark], thresholds: Sequence[float], verify: bool | None
) -> dict[str, DecodingConfig]:
    ways = ways_to_decode(lm, thresholds, verify=verify)
    likelihoods = [benchmark.name for benchmark in benchmarks if not benchmark.decodes]
    if not likelihoods:
        return ways
    if len(likelihoods) < len(benchmarks):
        raise FastDLLMError(
            f"{', '.join(likelihoods)}: compares likelihoods and decodes nothing; evaluate it by itself"
        )
    return {AR: DecodingConfig(**ONE_AT_A_TIME)}
