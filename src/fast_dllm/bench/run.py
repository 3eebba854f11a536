"""`run_bench`: load, measure table by table, print, write."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.bench.bench import Bench, Part
from fast_dllm.bench.figures import write_figures
from fast_dllm.bench.findings import BenchResult, Findings
from fast_dllm.bench.first_token import measure_first_token
from fast_dllm.bench.growth import growth_parts
from fast_dllm.bench.latency import latency_parts
from fast_dllm.bench.linears import measure_linears
from fast_dllm.bench.options import BenchOptions, Plan
from fast_dllm.bench.peaks import Peaks, measure_peaks
from fast_dllm.bench.peers import measure_peers
from fast_dllm.bench.precision import measure_precision
from fast_dllm.bench.questions import ask_about
from fast_dllm.bench.report import write_json
from fast_dllm.bench.resume import take_over
from fast_dllm.bench.throughput import throughput_parts
from fast_dllm.checkpoint.fingerprint import digest
from fast_dllm.errors import FastDLLMError
from fast_dllm.files import unwritable
from fast_dllm.machine import provenance
from fast_dllm.progress import busy


def run_bench(options: BenchOptions, *, screen: Console | None = None) -> BenchResult:
    """Measure a model on this machine, all contestants in this one process.

    Args:
        options: what to measure.
        screen: for progress; None is standard error.

    Returns:
        What was found; also written to `options.out`/bench.json, with figures beside it.

    Raises:
        FastDLLMError: when the model cannot be used at all, or the results cannot be written.
    """
    started = time.perf_counter()
    screen = Console(stderr=True) if screen is None else screen
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if options.threads is None else options.threads)
    try:
        bench, about, earlier = _prepare(options, screen)

        def result(files: Sequence[str] = ()) -> BenchResult:
            seconds = round(earlier + time.perf_counter() - started, 1)
            return BenchResult(about, bench.findings.records, bench.findings.not_measured, seconds, files)

        for _ in _measure(bench, about["part_seconds"]):
            # A long run that is interrupted leaves the parts it finished.
            write_json(result(), options.out)
    finally:
        torch.set_num_threads(threads)
    whole = result([str(path) for path in write_figures(result(), options.out, bench.findings)])
    write_json(whole, options.out)
    return whole


def _prepare(options: BenchOptions, screen: Console) -> tuple[Bench, dict[str, Any], float]:
    """The run, what it is about, and the seconds that an earlier half of it took."""
    _open(options.out)
    plan, findings = options.plan(), Findings()
    with busy(screen, f"Loading {options.model}"):
        models = _load(options, plan.dtypes, findings)
        about = _about(options, plan, models)
    earlier = take_over(about, findings, options.out) if options.resume else 0.0
    machine = about["machine"]
    if "bandwidth_gb_per_s" not in machine:  # else an earlier half has measured it
        with busy(screen, "Measuring the machine"):
            machine.update(measure_peaks(models).to_dict())
    lm = next(iter(models.values()))
    questions = ask_about(lm.tokenizer, plan.items, seed=options.seed, trained_on=lm.checkpoint.trained_on)
    return Bench(options, plan, models, questions, findings, Peaks.from_dict(machine), screen), about, earlier


def _open(out: Path) -> None:
    """Make the directory now, not after all that was measured for it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from error


def _load(options: BenchOptions, dtypes: Sequence[str], findings: Findings) -> dict[str, BlockDiffusionLM]:
    models: dict[str, BlockDiffusionLM] = {}
    last: FastDLLMError | None = None
    for dtype in dtypes:
        try:
            models[dtype] = BlockDiffusionLM.from_pretrained(
                options.model, dtype=dtype, cache_dtype=options.cache_dtype, base=options.base
            )
        except FastDLLMError as error:
            last = error
            findings.skip(f"dtype {dtype}", error)
    if not models:
        raise FastDLLMError(str(last)) from last
    return models


def _parts(bench: Bench) -> Iterator[Part]:
    """The chosen tables, in parts of some minutes each."""
    tables: dict[str, Callable[[], Iterable[Part]]] = {
        "throughput": lambda: throughput_parts(bench),
        "latency": lambda: latency_parts(bench),
        "first_token": lambda: [("first_token", lambda: measure_first_token(bench))],
        "peers": lambda: [("peers", lambda: measure_peers(bench))],
        "growth": lambda: growth_parts(bench),
        "precision": lambda: [("precision", lambda: measure_precision(bench))],
        "linears": lambda: [("linears", lambda: measure_linears(bench))],
    }
    for name, parts in tables.items():
        if name in bench.options.tables:
            yield from parts()


def _measure(bench: Bench, seconds: dict[str, float]) -> Iterator[None]:
    """Measure what is not done; yields behind each part.

    Args:
        bench: gets what is found.
        seconds: of the parts that are done; gets those of others. One that fails gets none: it is no reason to lose
            the others, and a resumed run tries it again.
    """
    for name, measure in _parts(bench):
        if name in seconds:
            continue
        started = time.perf_counter()
        if bench.findings.attempt(name, measure):
            seconds[name] = round(time.perf_counter() - started, 1)
        yield


def _about(options: BenchOptions, plan: Plan, models: Mapping[str, BlockDiffusionLM]) -> dict[str, Any]:
    lm = next(iter(models.values()))
    return {
        **provenance(),
        "model": {
            "name": options.model,
            "origin": lm.checkpoint.origin,
            "weights": digest(lm.checkpoint.model),
            "block_size": lm.config.block_size,
            "mask_token_id": lm.config.mask_token_id,
            "context_attention": lm.config.context_attention,
            "backbones": {dtype: _backbone(own) for dtype, own in models.items()},
        },
        "options": options.to_dict(),
        "plan": _plain(plan),
        "part_seconds": {},
    }


def _backbone(lm: BlockDiffusionLM) -> str:
    kernels = getattr(lm.backbone, "kernels", None)
    return type(lm.backbone).__name__ + ("" if kernels is None else f" ({kernels})")


def _plain(plan: Any) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(plan).items()}
