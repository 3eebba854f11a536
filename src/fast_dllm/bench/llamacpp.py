"""llama.cpp through the `xllamacpp` package, in a process of its own.

Both it and torch use libgomp, which stops its threads from waiting actively as soon as there are more of them in a
process than cores: in one process with it, every forward of ours, and its own, took three times as long.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fast_dllm.errors import FastDLLMError

_ROUND_UP = 256


@dataclass(frozen=True)
class Completion:
    """An answer of llama.cpp.

    Attributes:
        text: what it wrote.
        tokens: that it predicted.
        tokens_per_s: by its own clock, the prompt left out.
    """

    text: str
    tokens: int
    tokens_per_s: float


class LlamaCpp:
    """A llama.cpp server without HTTP: idle between requests, one request at a time, greedy."""

    def __init__(self, path: Path, threads: int, longest: int) -> None:
        """Load a model.

        Args:
            path: a GGUF file.
            threads: for prompts and for decoding.
            longest: tokens of the longest prompt with its answer.

        Raises:
            FastDLLMError: when xllamacpp is not installed, or cannot load the file.
        """
        _library()
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, path, threads, longest), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server."""
        self._pipe.close()
        self._process.join(timeout=5)
        self._process.kill()

    def complete(self, prompt: list[int], tokens: int) -> Completion:
        """Go on with a prompt, every prompt computed anew.

        Args:
            prompt: token ids.
            tokens: to make, exactly: the end of an answer does not end it.

        Raises:
            FastDLLMError: when llama.cpp refuses the request.
        """
        size = {"max_tokens": tokens, "ignore_eos": True}
        self._pipe.send({"prompt": prompt, "temperature": 0, "cache_prompt": False, **size})
        reply = self._answer()
        if "error" in reply:
            raise FastDLLMError(f"llama.cpp: {reply['error'].get('message', reply['error'])}")
        timings = reply["timings"]
        return Completion(reply["choices"][0]["text"], timings["predicted_n"], timings["predicted_per_second"])

    def _answer(self) -> Any:
        try:
            reply = self._pipe.recv()
        except EOFError as error:
            raise FastDLLMError("llama.cpp: its process died") from error
        if isinstance(reply, str):
            raise FastDLLMError(reply)
        return reply


def _serve(pipe: Connection, path: Path, threads: int, longest: int) -> None:
    """Answer requests until the other side closes; sends {} when the model is loaded, or what went wrong."""
    try:
        complete = _load(path, threads, longest)
    except RuntimeError as error:
        pipe.send(f"{path}: llama.cpp cannot load it ({error})")
        return
    pipe.send({})
    try:
        while True:
            pipe.send(complete(pipe.recv()))
    except EOFError:
        del complete
        gc.collect()  # or the server's threads outlive it


def _load(path: Path, threads: int, longest: int) -> Callable[[Any], Any]:
    xllamacpp = _library()
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = -(-(longest + 1) // _ROUND_UP) * _ROUND_UP
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_ram_mib = 0
    params.verbosity = -1
    complete: Callable[[Any], Any] = xllamacpp.Server(params).handle_completions
    return complete


def system_info() -> str:
    """The instruction sets that the installed llama.cpp was built for."""
    return " ".join(str(_library().get_system_info()).split())


def _library() -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise FastDLLMError(
            "xllamacpp is not installed; run pip install '.[bench]' in fast-dllm's directory"
        ) from error
    return xllamacpp
