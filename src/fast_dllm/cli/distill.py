"""`fast-dllm distill`: chats to train on, answered by the model itself."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fast_dllm.cli.generate import with_bar
from fast_dllm.cli.options import BaseOption, DtypeOption, ModelArgument, SkipOption
from fast_dllm.cli.output import Interrupted, open_model

if TYPE_CHECKING:
    from fast_dllm.data.distill import DistillResult


def distill(
    model: ModelArgument,
    *,
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="As --prompt-file of generate, or conversations as --data of adapt: JSONL, parquet, a hub name "
            "(owner/name), or JSON that names more. Their answers are replaced, all of them.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the conversations go.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Limit of an answer.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Nucleus sampling, used when temperature > 0.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Question i draws from seed + i.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts decoded at once.")] = 8,
    keep_unfinished: Annotated[
        bool, typer.Option("--keep-unfinished", help="Keep answers that reached the limit of new tokens too.")
    ] = False,
    skip_bad_rows: SkipOption = None,
    dtype: DtypeOption = None,
    base: BaseOption = None,
) -> None:
    """Answer prompts with a model, to adapt it on its own answers.

    The model answers one token at a time, as it does before it is adapted. Of a conversation it answers one question
    after another, over its own answers to those before. A line {"messages": [...]} is written for each conversation,
    up to the first answer that did not end with a stop token. A run that was stopped goes on where it was when the
    same command is run again.
    """
    from fast_dllm.data.distill import autoregressive, questions
    from fast_dllm.data.distill import distill as run
    from fast_dllm.data.prompts import read_prompts
    from fast_dllm.data.sources import BadRows

    bad = BadRows(skip=bool(skip_bad_rows))
    decoding = autoregressive(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    asked = read_prompts(prompts, replace_answers=True, bad=bad)
    skipped, total = bad.count, sum(len(questions(prompt.messages)) for prompt in asked)
    lm = open_model(model, dtype=dtype, base=base)
    start = time.perf_counter()
    try:
        result = run(
            lm,
            asked,
            out,
            decoding,
            name=f"{lm.checkpoint.source} {lm.checkpoint.fingerprint} {dtype}",
            batch_size=batch_size,
            keep_unfinished=keep_unfinished,
            bad=bad,
            watch=lambda answers, done: with_bar(answers, total, what="distill", done=done),
        )
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on where it was") from None
    _tell(result, out, skipped, time.perf_counter() - start)


def _tell(result: "DistillResult", out: Path, skipped: int, seconds: float) -> None:
    typer.echo(f"kept        {result.kept} of {result.prompts} conversations")
    typer.echo(f"unfinished  {result.unfinished}: no stop token within --max-new-tokens")
    typer.echo(f"empty       {result.empty}")
    typer.echo(f"skipped     {skipped} bad rows, {result.refused} prompts too long for the model")
    typer.echo(f"time        {seconds / 60:.1f} min")
    typer.echo(f"chats       {out}")
    typer.echo(f"next        fast-dllm data {out} --model ...")
