"""`fast-dllm adapt`: an autoregressive model in, a block-diffusion model out."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fast_dllm.cli.dry_run import DeviceMemoryOption, DryRunOption, ProcessesOption, ShardedOption, refuse_devices
from fast_dllm.cli.dry_run import dry_run as estimate_run
from fast_dllm.cli.options import DataOption, SkipOption, given, listed, takes
from fast_dllm.cli.output import Interrupted, waiting
from fast_dllm.cli.recipe import Recipe, read_recipe
from fast_dllm.training.options import AdaptOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from fast_dllm.data.build import TrainingData
    from fast_dllm.data.sources import Document
    from fast_dllm.data.stream import SampleStream
    from fast_dllm.training.adapt import AdaptResult
    from fast_dllm.training.evaluation import ProbeItem


@takes(AdaptOptions)
def adapt(
    *,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the adapted checkpoint goes.", show_default=False)
    ],
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="The model to adapt, as for generate.")
    ] = None,
    data: DataOption = None,
    skip_bad_rows: SkipOption = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="NAME[,NAME...]", help="Generated reasoning tasks, alone or beside data."),
    ] = None,
    task_items: Annotated[
        int | None, typer.Option("--task-items", min=1, help="Training items, over all tasks. [default: 8000]")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help="JSON or TOML of any of these settings (with _ for -, and tasks for --task). Options given here win; "
            "--data or --task replaces both of the file's.",
        ),
    ] = None,
    dry_run: DryRunOption = False,
    processes: ProcessesOption = 1,
    sharded: ShardedOption = False,
    device_memory: DeviceMemoryOption = None,
    **settings: Any,
) -> None:
    """Adapt a pretrained autoregressive model to block diffusion.

    An interrupted run goes on from its last save when the same command is run again.
    """
    written = {} if recipe is None else read_recipe(recipe)
    if data or task is not None:
        # Whoever names data wants to train on that, and not on the recipe's too.
        written = {key: value for key, value in written.items() if key not in ("data", "tasks")}
    tasks = None if task is None else listed("task", task, str)
    own = {"model": model, "data": data or None, "tasks": tasks, "task_items": task_items, **settings}
    own["skip_bad_rows"] = skip_bad_rows
    plan = Recipe.from_settings({**written, **given(own)}, needs_data=not dry_run)
    if dry_run:
        estimate_run(plan.model, plan.options, processes, sharded, device_memory)
        return
    refuse_devices(processes, sharded, device_memory)
    from rich.console import Console

    # Of the processes of a parallel run the first one speaks.
    console = Console(stderr=True, quiet=os.environ.get("RANK", "0") != "0")
    try:
        _run(plan, out, console)
    except KeyboardInterrupt:
        console.show_cursor()  # the progress bar hides it
        raise Interrupted("stopped; the same command goes on from the last save") from None


def _run(plan: Recipe, out: Path, console: "Console") -> None:
    options = plan.options
    with waiting("preparing the data"):
        from fast_dllm.checkpoint.directory import check_target
        from fast_dllm.config import TaskItems
        from fast_dllm.training.adapt import adapt as train

        check_target(out)
        tokenizer, data = _stream(plan) if options.stream else _in_memory(plan)
    probe = _probe(plan, tokenizer) if plan.tasks else None
    if not console.quiet:
        found = f"{len(data.held_out)} held out, the others are read as they are trained"
        typer.echo(f"samples        {found if options.stream else data.describe(options.max_length)}")
    # The progress is that of training alone; loading and measuring take their time too.
    told = "adapting; the held-out loss is measured before and after"
    with console.status(told) if console.is_terminal and not console.quiet else nullcontext():
        shown = None if console.quiet else console
        result = train(
            plan.model,
            data.samples,
            options,
            out,
            held_out=data.held_out,
            probe=probe,
            console=shown,
            generated=TaskItems(plan.tasks, plan.task_items) if plan.tasks else None,
        )
    if console.quiet:
        return
    if options.stream:
        typer.echo(f"samples read   {data.describe(options.max_length)}")
    _tell_result(result, options)


def _in_memory(plan: Recipe) -> "tuple[Any, TrainingData]":
    """The model's tokenizer, and all samples."""
    from fast_dllm.checkpoint import load_tokenizer_of
    from fast_dllm.data.build import gather_conversations, render_conversations

    options = plan.options
    conversations = gather_conversations(
        plan.data,
        plan.tasks,
        task_items=plan.task_items,
        held_out=options.eval_samples,
        skip_bad_rows=plan.skip_bad_rows,
        seed=options.seed,
    )
    tokenizer = load_tokenizer_of(plan.model, base=options.base)
    workers, max_length = options.data_workers, options.max_length
    return tokenizer, render_conversations(tokenizer, conversations, max_length=max_length, workers=workers)


def _stream(plan: Recipe) -> "tuple[Any, SampleStream]":
    """The model's tokenizer, and samples that are read as they are trained."""
    from fast_dllm.checkpoint import load_tokenizer_of
    from fast_dllm.data.build import stream_documents, task_documents
    from fast_dllm.data.sources import BadRows
    from fast_dllm.data.stream import SampleStream

    options, bad = plan.options, BadRows(skip=plan.skip_bad_rows)
    made = task_documents(plan.tasks, plan.task_items)[0] if plan.tasks else []

    def documents(epoch: int) -> "Iterator[Document]":
        buffer, seed = options.shuffle_buffer, options.seed
        return stream_documents(plan.data, made, shuffle_buffer=buffer, seed=seed, bad=bad, epoch=epoch)

    tokenizer = load_tokenizer_of(plan.model, base=options.base)
    return tokenizer, SampleStream(
        tokenizer,
        documents,
        held_out=options.eval_samples,
        max_length=options.max_length,
        bad=bad,
        workers=options.data_workers,
    )


def _probe(plan: Recipe, tokenizer: Any) -> "list[ProbeItem]":
    """Held-out questions of the tasks, with their verifiers."""
    from fast_dllm.data.tasks import Item, held_out_items, is_correct
    from fast_dllm.text import ChatText
    from fast_dllm.training.evaluation import ProbeItem

    text = ChatText(tokenizer)

    def verifier(item: Item) -> "Callable[[list[int]], bool]":
        return lambda answer: is_correct(item, text.decode(answer))

    items = held_out_items(plan.tasks, plan.options.probe_items, seed=0)
    return [ProbeItem(text.prompt_ids(item.messages()[:-1]), verifier(item)) for item in items]


def _tell_result(result: "AdaptResult", options: AdaptOptions) -> None:
    if result.loss_before is not None and result.loss_after is not None:
        typer.echo(f"held-out loss  {result.loss_before:.3f} -> {result.loss_after:.3f} nats per response token")
    typer.echo(f"steps          {result.steps} of {options.steps}")
    typer.echo(f"time           {result.seconds / 60:.1f} min")
    typer.echo(f"checkpoint     {result.directory}")
    following = "adapt --data ... --model" if options.objective == "ar" else "chat"
    typer.echo(f"next           fast-dllm {following} {result.directory}")
