"""The commands put together, and what becomes of their errors. Nothing here imports torch."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fast_dllm import __version__
from fast_dllm.cli.ablate import ablate
from fast_dllm.cli.adapt import adapt
from fast_dllm.cli.bench import bench
from fast_dllm.cli.bench_train import bench_train
from fast_dllm.cli.chat import chat
from fast_dllm.cli.data import data
from fast_dllm.cli.demo import demo
from fast_dllm.cli.distill import distill
from fast_dllm.cli.eval import evaluate
from fast_dllm.cli.export import export
from fast_dllm.cli.generate import generate
from fast_dllm.cli.info import info
from fast_dllm.cli.output import Interrupted
from fast_dllm.errors import FastDLLMError

BAD_INPUT, INTERRUPTED = 2, 130

# Plain help: it survives pipes, narrow terminals and being pasted into a README.
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _examples(*lines: str) -> str:
    # \b keeps the help from joining the lines.
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fast-dllm {__version__}")
        raise typer.Exit


@app.callback(
    invoke_without_command=True,
    epilog=_examples(
        "fast-dllm demo",
        "fast-dllm adapt --model Qwen/Qwen2.5-1.5B-Instruct --data chats.jsonl --out my-model",
        "fast-dllm chat my-model",
    ),
)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Block-diffusion language models from autoregressive ones: adapt, decode in parallel."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command(
    epilog=_examples(
        'fast-dllm generate my-model --prompt "Why is the sky blue?"',
        "fast-dllm generate my-model --prompt-file prompts.jsonl --out answers.jsonl --threshold 0.8",
        "cat prompts.txt | fast-dllm generate my-model --prompt-file - --mode ar",
    )
)(generate)
app.command(
    epilog=_examples(
        "fast-dllm chat my-model",
        "fast-dllm chat smollm2 --threshold 0.7 --temperature 0.5 --seed 1",
        "printf 'Hello\\nAnd in French?\\n' | fast-dllm chat my-model",
    )
)(chat)
app.command(
    epilog=_examples(
        "fast-dllm adapt --model Qwen/Qwen2.5-1.5B-Instruct --data chats.jsonl --out my-model",
        "fast-dllm adapt --model smollm2-base --task chain_sum,leg_counting --steps 200 --out my-model",
        "fast-dllm adapt --model my-model --data chats.jsonl --context-attention causal --gated-lora --mask-ratio 1 "
        "--block-size 8 --out my-drafting-model",
        "fast-dllm adapt --recipe recipe.toml --out my-model --learning-rate 1e-4",
        "fast-dllm adapt --recipe recipes/qwen2.5-7b.toml --out my-model --dry-run --processes 64 --sharded",
    )
)(adapt)
app.command(
    epilog=_examples(
        "fast-dllm data chats.jsonl --model Qwen/Qwen2.5-1.5B-Instruct",
        "fast-dllm data chats.jsonl:3 more.parquet:1 --model my-model --shuffle-buffer 1000 --samples 5",
        "fast-dllm data chats.jsonl --model my-model --skip-bad-rows --json",
    )
)(data)
app.command(
    epilog=_examples(
        "fast-dllm distill Qwen/Qwen2.5-1.5B-Instruct --prompts prompts.jsonl --out chats.jsonl",
        "fast-dllm distill model.gguf --prompts chats.jsonl --out own-chats.jsonl --dtype int8 --batch-size 16",
    )
)(distill)
app.command(epilog=_examples("fast-dllm export my-model --to my-model-hf"))(export)
app.command(epilog=_examples("fast-dllm info my-model", "fast-dllm info smollm2-base --json"))(info)
app.command(
    name="eval",
    epilog=_examples(
        "fast-dllm eval smollm2 --items 500 --dtype int8 --verify",
        "fast-dllm eval my-model --task chain_sum,leg_counting --threshold 0.8,0.9 --against my-ar-model",
        "fast-dllm eval my-model --task gsm8k,ifeval --benchmark-data gsm8k=test.jsonl --few-shot 0 --items 100",
    ),
)(evaluate)
app.command(epilog=_examples("fast-dllm demo", "fast-dllm demo --skip-adapt --questions 6"))(demo)
app.command(
    epilog=_examples(
        "fast-dllm bench",
        "fast-dllm bench my-model --dtype bfloat16,int8 --threshold 0.8,0.9 --tables throughput,peers",
        "fast-dllm bench --full --out runs/bench-full",
    )
)(bench)
app.command(
    "bench-train", epilog=_examples("fast-dllm bench-train", "fast-dllm bench-train --lengths 1024 --lora-rank 32")
)(bench_train)
app.command(epilog=_examples("fast-dllm ablate smollm2-base --mask-token '<reponame>' --steps 100 --seeds 3"))(ablate)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: arguments without the program's name; None takes the process's.

    Returns:
        The exit code: 0, 2 for bad input (told in one line on stderr), 130 when interrupted. Anything unexpected
        keeps its traceback.
    """
    try:
        code = app(args=argv, prog_name="fast-dllm", standalone_mode=False)
    except (FastDLLMError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        return _leave(f"error: {message}", BAD_INPUT)
    except Interrupted as interruption:
        return _leave(str(interruption), INTERRUPTED)
    if code == INTERRUPTED:  # typer's answer to Ctrl-C
        return _leave("interrupted", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _leave(line: str, code: int) -> int:
    print(" ".join(line.split()), file=sys.stderr)
    return code
