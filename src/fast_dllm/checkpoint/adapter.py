"""LoRA adapters over a base model: saved small, loaded merged."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open

from fast_dllm.checkpoint.checkpoint import (
    CONFIG_KEY,
    TRAINED_ON_KEY,
    Checkpoint,
    read_config,
    read_trained_on,
    vocabulary_rows,
)
from fast_dllm.checkpoint.directory import BLOCK_DIFFUSION_FILE
from fast_dllm.checkpoint.dtype import cast_weights
from fast_dllm.checkpoint.files import check_safetensors, first_line, read_json
from fast_dllm.checkpoint.huggingface import check_finite, load_tokenizer
from fast_dllm.checkpoint.mask_token import initialise_mask_row
from fast_dllm.errors import FastDLLMError
from fast_dllm.gated_lora import gate_adapter

_WEIGHTS = "adapter_model.safetensors"


def load_adapter(
    directory: Path, load_base: Callable[[str | Path], Checkpoint], *, base: str | Path | None
) -> Checkpoint:
    """Load an adapter's base, give it the mask token, and merge the adapter into it; a gated one stays beside it.

    Args:
        directory: with adapter_config.json, and block_diffusion.json where it is one of ours.
        load_base: loads a base by name, in its stored dtype.
        base: where the base is; None takes what the adapter recorded.

    Returns:
        A checkpoint in the base's dtype.

    Raises:
        FastDLLMError: when the adapter is broken or belongs to another base.
    """
    checkpoint = open_base(directory, load_base, base=base)
    gated = is_gated(directory)
    token = checkpoint.config.mask_token_id if gated else None
    checkpoint.model = _apply(checkpoint.model, directory, directory / _WEIGHTS, gated_token=token)
    check_finite(directory, checkpoint.model)
    kind = "gated LoRA adapter" if gated else "LoRA adapter"
    checkpoint.origin = f"{kind} {directory.name} over {checkpoint.origin}"
    checkpoint.base = checkpoint.source
    checkpoint.mask_token_added = False  # merged, its row is a trained one: no adapter on top may begin it anew
    return checkpoint


def open_base(directory: Path, load_base: Callable[[str | Path], Checkpoint], *, base: str | Path | None) -> Checkpoint:
    """Load an adapter's base and make it what the adapter was trained on: same weights, mask token and config.

    Args:
        directory: as for `load_adapter`.
        load_base: as for `load_adapter`.
        base: as for `load_adapter`.

    Returns:
        The base; the adapter's own weights are not in it.

    Raises:
        FastDLLMError: when the adapter is broken or belongs to another base.
    """
    config_path, weights = directory / "adapter_config.json", directory / _WEIGHTS
    peft_values = read_json(config_path)
    ours = read_json(directory / BLOCK_DIFFUSION_FILE) if (directory / BLOCK_DIFFUSION_FILE).exists() else None
    if peft_values.get("peft_type") != "LORA":
        kind = peft_values.get("peft_type")
        raise FastDLLMError(f"{config_path}: peft_type={kind!r}: only LoRA adapters can be merged; retrain it as LORA")
    if not weights.exists() and (directory / "adapter_model.bin").exists():
        raise FastDLLMError(f"{directory}: pickled weights are not read, they can run code; save them as safetensors")
    check_safetensors(weights)
    checkpoint = _load_base(directory, load_base, base_of(directory, base), named=base is not None)
    if ours is not None:
        _restore(checkpoint, ours, directory / BLOCK_DIFFUSION_FILE)
    tokenizer = load_tokenizer(directory)
    checkpoint.tokenizer = checkpoint.tokenizer if tokenizer is None else tokenizer
    return checkpoint


def base_of(directory: Path, base: str | Path | None) -> str | Path:
    """What an adapter lies over.

    Args:
        directory: as for `load_adapter`.
        base: as for `load_adapter`.

    Raises:
        FastDLLMError: when nobody says.
    """
    if base is not None:
        return base
    ours, config_path = directory / BLOCK_DIFFUSION_FILE, directory / "adapter_config.json"
    recorded = read_json(ours).get("base") if ours.exists() else None
    recorded = recorded or read_json(config_path).get("base_model_name_or_path")
    if not recorded:
        raise FastDLLMError(
            f"{config_path}: base_model_name_or_path is missing; name the base model with base (--base)"
        )
    return str(recorded)


def _load_base(
    directory: Path, load_base: Callable[[str | Path], Checkpoint], recorded: str | Path, *, named: bool
) -> Checkpoint:
    try:
        return load_base(recorded)
    except FastDLLMError as error:
        if named:
            raise
        raise FastDLLMError(
            f"{directory}: its base does not load: {error}; say where the base is with base (--base)"
        ) from error


def _restore(checkpoint: Checkpoint, ours: Mapping[str, Any], path: Path) -> None:
    recorded = ours.get("base_fingerprint")
    if recorded is not None and recorded != checkpoint.fingerprint:
        raise FastDLLMError(
            f"{path}: the adapter was trained on another base than {checkpoint.source} "
            f"(fingerprint {recorded[:8]}, not {str(checkpoint.fingerprint)[:8]}); name its own with base (--base)"
        )
    config = read_config(ours.get(CONFIG_KEY), path)
    mask = config.mask_token_id
    added = bool(ours.get("mask_token_added"))
    if mask is not None:
        if mask > vocabulary_rows(checkpoint.model) or (mask == vocabulary_rows(checkpoint.model) and not added):
            rows = vocabulary_rows(checkpoint.model)
            raise FastDLLMError(f"{path}: mask_token_id={mask} is outside the base's vocabulary of {rows}")
        if added:
            initialise_mask_row(checkpoint.model, mask)
    checkpoint.mask_token_added = added  # an adapter that is trained on records it again
    checkpoint.config = config
    checkpoint.stop_token_ids = tuple(ours.get("stop_token_ids", checkpoint.stop_token_ids))
    own = read_trained_on(ours.get(TRAINED_ON_KEY, []), path)
    checkpoint.trained_on = tuple(dict.fromkeys((*checkpoint.trained_on, *own)))


def is_gated(directory: Path) -> bool:
    """Whether the adapter in a directory acts at mask tokens alone."""
    ours = directory / BLOCK_DIFFUSION_FILE
    return ours.exists() and read_json(ours).get("gated") is True


def _apply(model: Any, directory: Path, weights: Path, *, gated_token: int | None) -> Any:
    stored = model.dtype
    try:
        # In float32: a bfloat16 weight plus a small update would often be the same weight again.
        wrapped = PeftModel.from_pretrained(model.float(), directory, config=PeftConfig.from_pretrained(directory))
        with safe_open(weights, framework="pt") as file:
            given = set(file.keys())
        expected = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
        if given != expected:
            name = sorted(given ^ expected)[0]
            raise FastDLLMError(
                f"{weights}: does not fit its adapter_config.json or base, first at {name}; copy it again"
            )
        applied = wrapped.merge_and_unload(safe_merge=True) if gated_token is None else _gate(wrapped, gated_token)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise FastDLLMError(f"{directory}: peft cannot load the adapter ({first_line(error)})") from error
    return cast_weights(applied, stored).eval()


def _gate(wrapped: PeftModel, token: int) -> Any:
    """The model with the adapter beside its weights; the mask token's own row is merged, as nothing else reads it."""
    model = wrapped.get_base_model()
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            merged = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            model.set_submodule(name, merged)
    gate_adapter(model, token)
    return model
