"""llama.cpp in this process, through the `xllamacpp` package."""

import gc
from dataclasses import dataclass
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
        xllamacpp = _library()
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = -(-(longest + 1) // _ROUND_UP) * _ROUND_UP
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_ram_mib = 0
        params.verbosity = -1
        try:
            self._server: Any = xllamacpp.Server(params)
        except RuntimeError as error:
            raise FastDLLMError(f"{path}: llama.cpp cannot load it ({error})") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server."""
        self._server = None
        gc.collect()

    def complete(self, prompt: list[int], tokens: int) -> Completion:
        """Go on with a prompt, every prompt computed anew.

        Args:
            prompt: token ids.
            tokens: at most; fewer when the model ends its answer.

        Raises:
            FastDLLMError: when llama.cpp refuses the request.
        """
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "cache_prompt": False}
        reply = self._server.handle_completions(asked)
        if "error" in reply:
            raise FastDLLMError(f"llama.cpp: {reply['error'].get('message', reply['error'])}")
        timings = reply["timings"]
        return Completion(reply["choices"][0]["text"], timings["predicted_n"], timings["predicted_per_second"])


def system_info() -> str:
    """The instruction sets that the installed llama.cpp was built for."""
    return " ".join(str(_library().get_system_info()).split())


def _library() -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise FastDLLMError("xllamacpp is not installed; run pip install 'fast-dllm[bench]'") from error
    return xllamacpp
