"""`fast-dllm bench-train`: our training step beside a plain one."""

import json
from pathlib import Path
from typing import Annotated

import typer

from fast_dllm.cli.options import listed
from fast_dllm.errors import FastDLLMError
from fast_dllm.files import write_whole


def bench_train(
    *,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="NUMBERS", help="Data tokens of a row, multiples of 32.")
    ] = "256,512,1024",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Processes of each contestant and length.")] = 3,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates of a process; the fastest counts.")] = 5,
    lora_rank: Annotated[int, typer.Option("--lora-rank", min=0, help="Of an adapter; 0 trains all weights.")] = 0,
    answer_share: Annotated[
        float, typer.Option("--answer-share", min=0.05, max=1.0, help="Share of a row that is answer.")
    ] = 1.0,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of each.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the JSON object here too.")] = None,
) -> None:
    """Measure a training step at SmolLM2-135M's shape against a straightforward one.

    That one runs two views, each [noisy | clean], under one dense mask, and computes the logits of all positions. Data
    tokens a second and peak memory, each in a process of its own. Prints a table, and one JSON object on the last line.
    """
    sizes = listed("lengths", lengths, int)
    if not sizes or any(size < 32 or size % 32 for size in sizes):
        raise FastDLLMError(f"--lengths {lengths}: must be multiples of 32 with commas between them")
    from fast_dllm.bench.training import attention_of_ours, measure_training
    from fast_dllm.machine import provenance

    findings = measure_training(
        sizes, rounds=rounds, steps=steps, lora_rank=lora_rank, answer_share=answer_share, threads=threads
    )
    typer.echo(f"{'length':>6}  {'quantity':<14} {'ours':>10} {'plain':>10} {'ours over plain (middle half)':>32}")
    for length in sizes:
        for quantity, ratio, scale in (("tokens_per_s", "speedup", 1.0), ("peak_bytes", "memory_share", 1e-9)):
            ours, plain = (r["value"] * scale for r in findings.records[quantity] if r["length"] == length)
            (paired,) = (r for r in findings.records[ratio] if r["length"] == length)
            low, high = paired["spread"]
            shown = f"{paired['value']:.2f} ({low:.2f} to {high:.2f})"
            name = "tokens/s" if scale == 1.0 else "peak GB"
            typer.echo(f"{length:>6}  {name:<14} {ours:>10.2f} {plain:>10.2f} {shown:>32}")
    typer.echo(f"attention: {attention_of_ours()}")
    about = provenance()
    about["machine"]["threads"] = about["machine"]["threads"] if threads is None else threads  # of each process
    report = json.dumps({**about, **findings.records})
    print(report)
    if out is not None:
        write_whole(out, report + "\n")
