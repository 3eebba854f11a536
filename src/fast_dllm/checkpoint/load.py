"""`load_checkpoint`: whatever a user names as a model, made a `Checkpoint`."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from fast_dllm.checkpoint import published
from fast_dllm.checkpoint.adapter import base_of, load_adapter, open_base
from fast_dllm.checkpoint.checkpoint import (
    AUTOREGRESSIVE,
    CONFIG_KEY,
    TRAINED_ON_KEY,
    Checkpoint,
    find_stop_token_ids,
    read_config,
    read_trained_on,
    vocabulary_rows,
)
from fast_dllm.checkpoint.dtype import cast_weights
from fast_dllm.checkpoint.files import first_line, read_json
from fast_dllm.checkpoint.fingerprint import fingerprint
from fast_dllm.checkpoint.gguf import load_gguf, load_gguf_tokenizer, smollm2_gguf
from fast_dllm.checkpoint.huggingface import check_finite, load_directory, load_tokenizer
from fast_dllm.checkpoint.mask_token import PUBLISHED_MASK_TOKEN, find_mask_token
from fast_dllm.checkpoint.quiet import quiet
from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.errors import FastDLLMError

SMOLLM2_BASE = "smollm2-base"
IN_THE_BOX = ("smollm2", "smollm2-ar")
"""Adapters in the package: the second fine-tunes SmolLM2 autoregressively, the first lets it draft as well."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": None}
_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.py", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def load_checkpoint(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    mask_token_id: int | None = None,
    block_size: int | None = None,
    token_shift: bool | None = None,
    context_attention: str | None = None,
    trust_remote_code: bool = False,
    base: str | Path | None = None,
) -> Checkpoint:
    """Load a model, whole and checked, from a directory, a GGUF file, an adapter or the hub.

    Args:
        source: a Hugging Face directory (any decoder-only model, ours, or the published Fast-dLLM v2 layout), a
            LoRA adapter's directory, a GGUF file, a hub id, or the name "smollm2", "smollm2-ar" or "smollm2-base".
            What exists locally wins over a name or id.
        dtype: of the weights: "float32", "bfloat16", "float16", or None or "auto" for the stored one.
        mask_token_id: overrides the checkpoint's; with it a plain AR model can be decoded as a diffusion model.
        block_size: overrides the checkpoint's.
        token_shift: overrides the checkpoint's.
        context_attention: overrides the checkpoint's.
        trust_remote_code: run the Python code that a checkpoint brings along.
        base: where an adapter's base is; None takes what the adapter recorded.

    Raises:
        FastDLLMError: when there is nothing there, or it is not whole, not a decoder-only model, or does not fit
            the settings.
    """
    wanted_dtype = _as_dtype(dtype)
    given = {
        "mask_token_id": mask_token_id,
        "block_size": block_size,
        "token_shift": token_shift,
        "context_attention": context_attention,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    path, name = _locate(source)
    is_adapter = (path / "adapter_config.json").exists()
    if base is not None and not is_adapter:
        raise FastDLLMError(f"{source}: not a LoRA adapter, so base={str(base)!r} has no meaning; leave it out")
    with quiet():
        if is_adapter:
            checkpoint = load_adapter(path, partial(load_checkpoint, trust_remote_code=trust_remote_code), base=base)
            if wanted_dtype is not None:
                cast_weights(checkpoint.model, wanted_dtype)
        elif path.is_file():
            checkpoint = _from_gguf(path, wanted_dtype)
        else:
            checkpoint = _from_directory(path, name, wanted_dtype, overrides, trust_remote_code=trust_remote_code)
    checkpoint.source = name
    checkpoint.config = _with_overrides(checkpoint, overrides)
    rows = vocabulary_rows(checkpoint.model)
    mask = checkpoint.config.mask_token_id
    if mask is not None and mask >= rows:
        raise FastDLLMError(f"{source}: mask_token_id={mask} is outside the vocabulary; give an id below {rows}")
    return checkpoint


def load_adapter_base(
    directory: str | Path, *, dtype: str | torch.dtype | None = None, base: str | Path | None = None
) -> Checkpoint:
    """Load what an adapter was trained on, to go on training the adapter.

    Args:
        directory: of the adapter.
        dtype: as for `load_checkpoint`.
        base: as for `load_checkpoint`.

    Raises:
        FastDLLMError: when the adapter is broken or belongs to another base.
    """
    with quiet():
        return open_base(Path(directory), partial(load_checkpoint, dtype=dtype), base=base)


def load_tokenizer_of(source: str | Path, *, base: str | Path | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of what `load_checkpoint` takes, without the model.

    Args:
        source: as for `load_checkpoint`.
        base: as for `load_checkpoint`; read where an adapter has no tokenizer of its own.

    Raises:
        FastDLLMError: when there is nothing there, or it has no tokenizer that can be read.
    """
    path, _ = _locate(source)
    with quiet():
        tokenizer = load_gguf_tokenizer(path) if path.is_file() else load_tokenizer(path)
    if tokenizer is None and (path / "adapter_config.json").exists():
        return load_tokenizer_of(base_of(path, base))
    if tokenizer is None:
        raise FastDLLMError(f"{source}: has no tokenizer, so conversations cannot be rendered for it")
    return tokenizer


def _from_gguf(path: Path, dtype: torch.dtype | None) -> Checkpoint:
    model, tokenizer, origin = load_gguf(path, dtype)
    check_finite(path, model)
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        config=AUTOREGRESSIVE,
        stop_token_ids=find_stop_token_ids(model, tokenizer),
        origin=f"{model.config.model_type}, {origin}",
        fingerprint=fingerprint(model),
    )


def _from_directory(
    path: Path, name: str, dtype: torch.dtype | None, overrides: dict[str, Any], *, trust_remote_code: bool
) -> Checkpoint:
    values = read_json(path / "config.json")
    model, tokenizer = load_directory(path, dtype, trust_remote_code=trust_remote_code)
    kind = "autoregressive"
    config = AUTOREGRESSIVE
    if CONFIG_KEY in values:
        config = read_config(values[CONFIG_KEY], path / "config.json")
        kind = "block diffusion" if config.block_size > 1 else kind
    elif values.get("model_type") == published.MODEL_TYPE:
        mask = overrides.get("mask_token_id", find_mask_token(tokenizer))
        if mask is None:
            raise FastDLLMError(
                f"{path}: no tokenizer with a mask token ({PUBLISHED_MASK_TOKEN}) and none in config.json; "
                "give mask_token_id (--mask-token-id), 151665 in the published models"
            )
        config = BlockDiffusionConfig(
            mask_token_id=mask, block_size=published.block_size_of(values, path / "config.json")
        )
        kind = "published Fast-dLLM v2"
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        config=config,
        stop_token_ids=find_stop_token_ids(model, tokenizer),
        origin=f"{model.config.model_type} ({kind}) from {name}",
        fingerprint=fingerprint(model),
        trained_on=read_trained_on(values.get(TRAINED_ON_KEY, []), path / "config.json"),
        stored_dtype=_DTYPES.get(str(values.get("dtype", values.get("torch_dtype")))),
    )


def _with_overrides(checkpoint: Checkpoint, overrides: dict[str, Any]) -> BlockDiffusionConfig:
    stored = checkpoint.config
    if not overrides:
        return stored
    if stored.mask_token_id is not None or overrides == {"block_size": 1}:
        return replace(stored, **overrides)
    # A plain AR model that is asked to be a diffusion model (or one like LLaDA, whose config has the mask token).
    mask = overrides.get("mask_token_id", getattr(checkpoint.model.config, "mask_token_id", None))
    if mask is None:
        mask = find_mask_token(checkpoint.tokenizer)
    if mask is None:
        raise FastDLLMError(
            f"{checkpoint.source}: no mask token in its tokenizer or config; give mask_token_id (--mask-token-id), or "
            "adapt the model"
        )
    return BlockDiffusionConfig(**{**overrides, "mask_token_id": mask})


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise FastDLLMError(f"dtype={dtype!r}: must be one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _locate(source: str | Path) -> tuple[Path, str]:
    """Where the files are, and the name by which an adapter should remember them."""
    path = Path(source).expanduser()
    if path.exists():
        _check_kind(path)
        return path, str(path.resolve())
    name = str(source)
    if name == SMOLLM2_BASE:
        return smollm2_gguf(), name
    if name in IN_THE_BOX:
        adapter = _ASSETS / name
        if not (adapter / "adapter_config.json").exists():
            raise FastDLLMError(f"{name}: the packaged adapter is not in this installation; reinstall fast-dllm")
        return adapter, name
    if isinstance(source, Path) or not _HUB_ID.fullmatch(name) or name.endswith((".gguf", ".safetensors")):
        raise FastDLLMError(f"{name}: no such file or directory, and not a hub id (owner/model) either")
    return _download(name), name


def _check_kind(path: Path) -> None:
    if path.is_file():
        if path.suffix == ".gguf" or path.open("rb").read(4) == b"GGUF":
            return
        raise FastDLLMError(f"{path}: neither a directory nor a GGUF file; name the directory that holds config.json")
    if (path / "config.json").exists() or (path / "adapter_config.json").exists():
        return
    files = sorted(path.glob("*.gguf"))
    hint = f"name a file in it: {files[0]}" if files else "name the directory that holds config.json"
    raise FastDLLMError(f"{path}: no config.json or adapter_config.json in it; {hint}")


def _download(name: str) -> Path:
    try:
        # Code comes along unread: it runs only with trust_remote_code.
        path = Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*", "consolidated*"]))
    except (OSError, ValueError, RuntimeError) as error:
        raise FastDLLMError(
            f"{name}: no such directory here, and the Hugging Face hub did not give it ({first_line(error)}); "
            "check the name and the connection, or download the model and name its directory"
        ) from error
    _check_kind(path)
    return path
