"""`fast-dllm chat`: a conversation in the terminal."""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

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
from fast_dllm.errors import FastDLLMError

if TYPE_CHECKING:
    from fast_dllm.api import BlockDiffusionLM, TextStream

_HELP = "/reset begins anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


@takes(DecodingConfig, skip=("stop_token_ids", "stop_strings"), defaults={"max_new_tokens": 256})
def chat(
    model: ModelArgument,
    *,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message.")] = None,
    mode: ModeOption = "diffusion",
    stop: StopOption = None,
    dtype: DtypeOption = None,
    cache_dtype: CacheDtypeOption = None,
    compile: CompileOption = False,
    mask_token_id: MaskOption = None,
    base: BaseOption = None,
    **settings: Any,
) -> None:
    """Talk with a model.

    Answers appear as they are decoded. /reset begins anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer. Without
    a terminal, each line of standard input is one user turn.
    """
    decoding = decoding_from_options(mode, stop, settings)
    lm = open_model(
        model, dtype=dtype, cache_dtype=cache_dtype, mask_token_id=mask_token_id, base=base, compile=compile
    )
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        print(f"{lm.checkpoint.origin}\n{_HELP}", file=sys.stderr)
    conversation = _Conversation(lm, decoding, system)
    for line in _lines(interactive):
        command = line.strip()
        if command == "/quit":
            return
        if command == "/reset":
            conversation.reset()
        elif command:
            conversation.turn(line, interactive=interactive)


class _Conversation:
    """What has been said, and how to go on."""

    def __init__(self, model: "BlockDiffusionLM", decoding: DecodingConfig, system: str | None) -> None:
        self._model = model
        self._decoding = decoding
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        self._messages = list(self._opening)

    def turn(self, question: str, *, interactive: bool) -> None:
        """Answer a question and remember both, also when the answer is stopped half-way.

        Raises:
            FastDLLMError: without a terminal, for a conversation that has become too long; on one it is told.
        """
        messages = [*self._messages, {"role": "user", "content": question}]
        try:
            stream = self._model.stream(messages, self._decoding)
        except FastDLLMError as error:
            if not interactive:
                raise
            print(f"error: {error}; /reset begins anew", file=sys.stderr)
            return
        text = _show(stream, interactive=interactive)
        self._messages = [*messages, {"role": "assistant", "content": text}]


def _show(stream: "TextStream", *, interactive: bool) -> str:
    text, note, start = "", "", time.perf_counter()
    try:
        for event in stream:
            text += event.text
            print(event.text, end="", flush=True)
            if event.finish is not None:
                break
    except KeyboardInterrupt:
        if not interactive:
            raise
        note = ", stopped"
    seconds = time.perf_counter() - start
    print(flush=True)
    (state,) = stream.states
    tokens, forwards = len(state.answer()), state.statistics.forwards
    print(
        f"[{tokens} tokens, {tokens / max(forwards, 1):.2f} per forward, {tokens / seconds:.1f} tokens/s{note}]",
        file=sys.stderr,
    )
    return text


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from _piped_lines()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() line editing and history)
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print(f"\n{_HELP}", file=sys.stderr)
        except EOFError:
            print()
            return


def _piped_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise FastDLLMError(f"standard input:{number}: not UTF-8 ({error.reason}); convert it to UTF-8") from error
