"""`fast-dllm export`: a directory that plain transformers runs."""

from pathlib import Path
from typing import Annotated

import typer

from fast_dllm.cli.options import BaseOption, ModelArgument, StoredDtypeOption


def export(
    model: ModelArgument,
    *,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="The new directory.", show_default=False)],
    dtype: StoredDtypeOption = None,
    base: BaseOption = None,
) -> None:
    """Write a model for plain transformers.

    It loads with trust_remote_code=True, and decodes with the code that it brings along.
    """
    from fast_dllm.checkpoint import load_checkpoint
    from fast_dllm.export import export_checkpoint

    export_checkpoint(load_checkpoint(model, dtype=dtype, base=base), to)
    typer.echo(f"{to}: load it with AutoModelForCausalLM.from_pretrained({str(to)!r}, trust_remote_code=True)")
