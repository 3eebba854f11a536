"""`fast-dllm demo`: autoregressive decoding beside block diffusion on a real model."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    *,
    model: Annotated[str, typer.Option("--model", help="The adapted model that answers.")] = "smollm2",
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where results go.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option("--minutes", min=0.0, help="Of adapting live.")] = 3.0,
    questions: Annotated[int, typer.Option("--questions", min=1, help="Questions answered by both decoders.")] = 12,
    skip_adapt: Annotated[bool, typer.Option("--skip-adapt", help="Only the race.")] = False,
) -> None:
    """Race an adapted model against its own decoding of one token at a time.

    Before, for --minutes, a small model is adapted live, to show how its loss falls: smollm2-base, which is not yet the
    one that answers.
    """
    from rich.console import Console

    from fast_dllm.demo.run import run_demo

    run_demo(model=model, out=out, minutes=minutes, questions=questions, adapt=not skip_adapt, console=Console())
