"""`fast-dllm bench`: what block diffusion gains on this machine."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fast_dllm.bench.options import DTYPES, TABLES, BenchOptions
from fast_dllm.cli.options import BaseOption, CacheDtypeOption, ModelArgument, listed


def bench(
    model: ModelArgument = "smollm2",
    *,
    full: Annotated[bool, typer.Option("--full", help="All sizes, thresholds and dtypes: hours.")] = False,
    tables: Annotated[
        str | None,
        typer.Option(
            "--tables",
            metavar="NAMES",
            help=f"Of {','.join(TABLES)}; all by default.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where bench.json and the figures go.")] = Path(
        "runs/bench"
    ),
    usual_way: Annotated[
        bool, typer.Option("--usual-way", help="Of block diffusion, only the model's default way to decode.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what DIR has of the same run, and measure the rest.")
    ] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", metavar="NAMES", help=f"Of {','.join(DTYPES)}.")] = None,
    cache_dtype: CacheDtypeOption = None,
    base: BaseOption = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads of every contestant.")] = None,
    items: Annotated[int | None, typer.Option("--items", help="Held-out questions to ask.")] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="NUMBERS", help="Prompts decoded at once, such as 1,16.")
    ] = None,
    threshold: Annotated[
        str | None, typer.Option("--threshold", metavar="NUMBERS", help="Of block diffusion, such as 0.8,0.9.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Chooses the questions.")] = 0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Limit of an answer.")] = 128,
) -> None:
    """Measure a model on this machine: speed, accuracy, and where the time goes.

    AR, block diffusion, transformers and llama.cpp take turns in one process. Prints tables, and one JSON object on
    the last line.
    """
    chosen: dict[str, Any] = {} if tables is None else {"tables": listed("tables", tables, str)}
    from rich.console import Console

    options = BenchOptions(
        model=model,
        base=base,
        full=full,
        out=out,
        usual_way=usual_way,
        resume=resume,
        dtypes=listed("dtype", dtype, str),
        cache_dtype=cache_dtype,
        threads=threads,
        items=items,
        batches=listed("batch", batch, int),
        thresholds=listed("threshold", threshold, float),
        seed=seed,
        max_new_tokens=max_new_tokens,
        **chosen,
    )
    from fast_dllm.bench.report import print_result, to_json
    from fast_dllm.bench.run import run_bench

    result = run_bench(options)
    # Tables are wide; in a pipe there is no terminal whose width would limit them.
    print_result(result, Console() if sys.stdout.isatty() else Console(width=160))
    print(to_json(result))
