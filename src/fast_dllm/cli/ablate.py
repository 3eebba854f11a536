"""`fast-dllm ablate`: what the parts of the method are worth."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fast_dllm.cli.options import given, listed, takes
from fast_dllm.files import write_whole
from fast_dllm.training.options import AdaptOptions

_VARIED = ("seed", "pack", "pad_to_block", "complementary", "context_attention", "ar_weight", "objective")
_OF_DATA = ("stream", "shuffle_buffer")


@takes(AdaptOptions, skip=(*_VARIED, *_OF_DATA))
def ablate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The small model to adapt, as for adapt.")],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the adapted models go.")] = Path(
        "runs/ablate"
    ),
    task: Annotated[
        str, typer.Option("--task", metavar="NAME[,NAME...]", help="Generated reasoning tasks.")
    ] = "chain_sum,leg_counting",
    task_items: Annotated[int, typer.Option("--task-items", min=1, help="Training items, over all tasks.")] = 2000,
    items: Annotated[int, typer.Option("--items", min=1, help="Held-out questions to ask.")] = 50,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each variant.")] = 3,
    **settings: Any,
) -> None:
    """Train with and without padding to blocks, complementary masks, and causal context, over several seeds.

    Prints the share of right answers beside the published one of the 1.5B model, and JSON on the last line (also in
    DIR/ablation.json). A run that was interrupted goes on; one that is done is not trained again.
    """
    options, tasks = AdaptOptions(**given(settings)), listed("task", task, str)
    from fast_dllm.bench.ablation import ablate as train_all
    from fast_dllm.machine import provenance

    def tell(name: str, seed: int) -> None:
        typer.echo(f"{name}, seed {seed}", err=True)

    outcomes = [
        outcome.to_dict()
        for outcome in train_all(
            model, tasks, options, out, seeds=seeds, items=items, task_items=task_items, on_run=tell
        )
    ]
    typer.echo(
        f"{'variant':<32} {'right: mean':>12} {'median (middle half)':>24} {'published':>10} {'tokens/forward':>15}"
    )
    for found in outcomes:
        low, high = found["spread"]
        middle = f"{found['median']:.1%} ({low:.1%} to {high:.1%})"
        published = "-" if found["published"] is None else f"{found['published']:.1f}%"
        tokens = sum(found["tokens_per_forward"]) / len(found["tokens_per_forward"])
        typer.echo(f"{found['name']:<32} {found['mean']:>12.1%} {middle:>24} {published:>10} {tokens:>15.2f}")
    asked = {"model": model, "tasks": tasks, "task_items": task_items, "questions": items}
    report = json.dumps({**provenance(), **asked, "options": options.to_dict(), "outcomes": outcomes})
    write_whole(out / "ablation.json", report + "\n")
    print(report)
