"""Reading what a checkpoint directory holds, before anything is built from it."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fast_dllm.errors import FastDLLMError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_INDEX = "model.safetensors.index.json"


def first_line(error: BaseException) -> str:
    """The first line of a library's error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FastDLLMError: when the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FastDLLMError(f"{path}: no such file") from error
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        raise FastDLLMError(f"{where}: broken JSON ({error.msg}); repair the file or copy it again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise FastDLLMError(f"{path}: cannot be read ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise FastDLLMError(f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


def has_tokenizer(directory: Path) -> bool:
    """Whether the directory holds a tokenizer."""
    return any((directory / name).exists() for name in _TOKENIZER_FILES)


def check_weight_files(directory: Path) -> None:
    """See that every safetensors file is there and whole.

    Raises:
        FastDLLMError: when one is missing or truncated, or when the weights are only there as pickles, which
            can run code when read.
    """
    files = _weight_files(directory)
    if not files:
        pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
        if pickles:
            raise FastDLLMError(
                f"{directory / pickles[0]}: pickled weights are not read, they can run code; convert them to "
                "safetensors (load and save_pretrained in a sandbox)"
            )
        raise FastDLLMError(f"{directory}: no weights; a model.safetensors is needed beside config.json")
    for path in files:
        check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """See that a safetensors file is whole.

    Raises:
        FastDLLMError: when it is missing, truncated or something else.
    """
    try:
        with safe_open(path, framework="pt"):
            pass
    except FileNotFoundError as error:
        raise FastDLLMError(f"{path}: no such file; copy the checkpoint again, all of it") from error
    except (SafetensorError, OSError) as error:
        reason = first_line(error)
        raise FastDLLMError(f"{path}: truncated or not safetensors ({reason}); copy it again") from error


def _weight_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if (directory / "model.safetensors").exists() or not index.exists():
        return sorted(directory.glob("model*.safetensors"))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FastDLLMError(f"{index}: no weight_map of file names; copy the checkpoint again")
    return sorted({directory / name for name in weight_map.values()})
