"""Block-diffusion language models from autoregressive ones: adapt, decode in parallel, measure, serve."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fast_dllm.api import BlockDiffusionLM, Reply, TextEvent
    from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
    from fast_dllm.errors import FastDLLMError
    from fast_dllm.generation import GenerateResult

__version__ = "0.1.0"

__all__ = [
    "BlockDiffusionConfig",
    "BlockDiffusionLM",
    "DecodingConfig",
    "FastDLLMError",
    "GenerateResult",
    "Reply",
    "TextEvent",
]

_HOMES = {
    "BlockDiffusionConfig": "config",
    "BlockDiffusionLM": "api",
    "DecodingConfig": "config",
    "FastDLLMError": "errors",
    "GenerateResult": "generation",
    "Reply": "api",
    "TextEvent": "api",
}


def __getattr__(name: str) -> object:
    # Importing torch takes seconds; `fast-dllm --help` must not.
    if name in _HOMES:
        return getattr(import_module(f"fast_dllm.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
