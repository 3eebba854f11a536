"""`fast-dllm generate`: prompts in, answers out."""

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from fast_dllm.cli.options import (
    BaseOption,
    CacheDtypeOption,
    CompileOption,
    DtypeOption,
    MaskOption,
    ModelArgument,
    ModeOption,
    StopOption,
    decoding_from_options,
    takes,
)
from fast_dllm.cli.output import open_model
from fast_dllm.config import DecodingConfig
from fast_dllm.data.prompts import Prompt, read_prompts
from fast_dllm.errors import FastDLLMError
from fast_dllm.files import whole_file
from fast_dllm.text import check_messages

if TYPE_CHECKING:
    from fast_dllm.streaming import Reply


@takes(DecodingConfig, skip=("stop_token_ids", "stop_strings"), defaults={"max_new_tokens": 256})
def generate(
    model: ModelArgument,
    *,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="One prompt; - takes all of standard input.")
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            "--prompt-file",
            metavar="FILE",
            help='.txt: a prompt per line; .jsonl: rows of {"prompt": ...} or {"messages": [...]}, "id" optional; '
            "- is standard input.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write JSON lines here instead of standard output.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON on a terminal too, where --prompt prints text.")
    ] = False,
    mode: ModeOption = "diffusion",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts decoded at once.")] = 8,
    stop: StopOption = None,
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    compile: CompileOption = False,
    mask_token_id: MaskOption = None,
    base: BaseOption = None,
    **settings: Any,
) -> None:
    """Answer prompts, one or a file of them.

    Writes one JSON object per line: id, prompt or messages, text, finish, new_tokens, forwards, tokens_per_forward,
    seconds (since the line before it: their sum is the time of all).
    """
    prompts = _prompts(prompt, prompt_file)
    decoding = decoding_from_options(mode, stop, settings)
    with contextlib.nullcontext(sys.stdout) if out is None else whole_file(out) as file:
        lm = open_model(
            model, dtype=dtype, cache_dtype=cache_dtype, mask_token_id=mask_token_id, base=base, compile=compile
        )
        answers = lm.answers([row.messages for row in prompts], decoding, max_batch=batch_size)
        if prompt is not None and out is None and not as_json and sys.stdout.isatty():
            _print_text(next(answers))
        else:
            _write_rows(prompts, answers, file)


def _prompts(prompt: str | None, prompt_file: str | None) -> list[Prompt]:
    if (prompt is None) == (prompt_file is None):
        problem = "no prompt" if prompt is None else "--prompt and --prompt-file exclude each other"
        raise FastDLLMError(f"{problem}; give one of --prompt TEXT and --prompt-file FILE (- is standard input)")
    if prompt_file is not None:
        return read_prompts(prompt_file)
    text = _standard_input() if prompt == "-" else str(prompt)
    if not text.strip():
        raise FastDLLMError("--prompt is empty; write what to ask")
    return [Prompt(check_messages([{"role": "user", "content": text}]))]


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise FastDLLMError(f"standard input: not UTF-8 ({error.reason}); convert it to UTF-8") from error


def _print_text(answer: "Reply") -> None:
    print(answer.text)
    statistics = answer.statistics
    print(
        f"[{statistics.new_tokens} tokens, {statistics.forwards} forwards, "
        f"{statistics.tokens_per_forward:.2f} tokens per forward]",
        file=sys.stderr,
    )


def _write_rows(prompts: Sequence[Prompt], answers: "Iterator[Reply]", file: TextIO) -> None:
    # One shape for all rows of a file: "prompt" where every row is a single question.
    are_texts = all(len(row.messages) == 1 for row in prompts)
    since = time.perf_counter()
    for index, (row, answer) in enumerate(zip(prompts, with_bar(answers, len(prompts)), strict=True)):
        now = time.perf_counter()
        asked = {"prompt": row.messages[0]["content"]} if are_texts else {"messages": row.messages}
        written = {
            "id": index if row.id is None else row.id,
            **asked,
            "text": answer.text,
            "finish": answer.finish,
            "new_tokens": answer.statistics.new_tokens,
            "forwards": answer.statistics.forwards,
            "tokens_per_forward": round(answer.statistics.tokens_per_forward, 3),
            "seconds": round(now - since, 4),
        }
        since = now
        file.write(json.dumps(written, ensure_ascii=False) + "\n")
        file.flush()


def with_bar(answers: "Iterable[Reply]", total: int, *, what: str = "generate", done: int = 0) -> "Iterator[Reply]":
    """The answers, with a progress bar on standard error where that is a terminal.

    Args:
        answers: as they become ready.
        total: how many there will be, those done before included; one alone gets no bar.
        what: said in front of the bar.
        done: answered before.
    """
    if total == 1:
        yield from answers
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} tokens per forward"),
        TimeRemainingColumn(),
    )
    tokens = forwards = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total, completed=done, rate="-")
        for answer in answers:
            tokens, forwards = tokens + answer.statistics.new_tokens, forwards + answer.statistics.forwards
            progress.update(task, advance=1, rate=f"{tokens / max(forwards, 1):.2f}")
            yield answer
