"""The published Fast-dLLM v2 layout (`model_type: Fast_dLLM_Qwen`): Qwen2 under another name, read without its code."""

from pathlib import Path
from typing import Any

from fast_dllm.errors import FastDLLMError

MODEL_TYPE = "Fast_dLLM_Qwen"
_NOT_QWEN2 = ("architectures", "auto_map", "model_type", "bd_size", "transformers_version")


def as_qwen2(values: dict[str, Any]) -> dict[str, Any]:
    """The config of the Qwen2 model that the checkpoint is."""
    kept = {key: value for key, value in values.items() if key not in _NOT_QWEN2}
    return {**kept, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def block_size_of(values: dict[str, Any], path: Path) -> int:
    """The block size it was trained with.

    Raises:
        FastDLLMError: when the config does not say.
    """
    size = values.get("bd_size")
    if not isinstance(size, int):
        raise FastDLLMError(f"{path}: bd_size={size!r}: must be the block size, an integer (published models: 32)")
    return size
