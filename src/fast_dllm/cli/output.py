"""What commands show while they work, and the last word of an interrupted run."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fast_dllm.api import BlockDiffusionLM


class Interrupted(Exception):
    """The user stopped the command; says what becomes of the work."""


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on standard error, where that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


def open_model(model: str, **settings: Any) -> "BlockDiffusionLM":
    """Load a model, with a spinner (arguments as for `BlockDiffusionLM.from_pretrained`).

    Raises:
        FastDLLMError: as that does.
    """
    with waiting(f"loading {model}"):
        from fast_dllm.api import BlockDiffusionLM

        return BlockDiffusionLM.from_pretrained(model, **settings)
