"""`fast-dllm demo`: autoregressive decoding beside block diffusion on a real model."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    *,
    model: Annotated[str, typer.Option("--model", help="What to demonstrate.")] = "smollm2",
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where results go.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option("--minutes", min=0.0, help="Time for adapting the model.")] = 3.0,
    questions: Annotated[int, typer.Option("--questions", min=1, help="Questions answered by both decoders.")] = 12,
    skip_adapt: Annotated[bool, typer.Option("--skip-adapt", help="Only decode, with the model as it is.")] = False,
) -> None:
    """Adapt a small real model, and race it.

    It is adapted for a few minutes, and decodes beside autoregressive decoding.
    """
    from rich.console import Console

    from fast_dllm.demo.run import run_demo

    run_demo(model=model, out=out, minutes=minutes, questions=questions, adapt=not skip_adapt, console=Console())
