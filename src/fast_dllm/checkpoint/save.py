"""Saving: a whole model, or a LoRA adapter that stays small."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import safe_open
from transformers import GenerationConfig

from fast_dllm.checkpoint.card import model_card
from fast_dllm.checkpoint.checkpoint import (
    CONFIG_KEY,
    TRAINED_ON_KEY,
    Checkpoint,
    vocabulary_rows,
    written_trained_on,
)
from fast_dllm.checkpoint.directory import BLOCK_DIFFUSION_FILE, whole_directory
from fast_dllm.checkpoint.files import read_json
from fast_dllm.checkpoint.quiet import quiet
from fast_dllm.errors import FastDLLMError
from fast_dllm.gated_lora import gated_token


def save_checkpoint(checkpoint: Checkpoint, directory: str | Path, *, recipe: Mapping[str, Any] | None = None) -> None:
    """Write a whole model: safetensors, configs, tokenizer and a model card.

    Plain transformers reads it too (as the autoregressive model it is made of).

    Args:
        checkpoint: what to write.
        directory: new, empty, or an earlier checkpoint of ours, which is replaced when all is written.
        recipe: how it was made, for the card.

    Raises:
        FastDLLMError: when the directory is someone else's or cannot be written, or the model has a gated adapter.
    """
    model = checkpoint.model
    if gated_token(model) is not None:
        raise FastDLLMError(
            f"{checkpoint.origin}: acts at mask tokens alone, so no whole model holds it; "
            "keep the adapter's directory and its base"
        )
    with whole_directory(directory) as temporary, quiet():
        generation, model.generation_config = model.generation_config, _generation_config(checkpoint)
        # An exported directory names code of its own, which is not saved with the weights.
        model.config.__dict__.pop("auto_map", None)
        try:
            model.save_pretrained(temporary)
        finally:
            model.generation_config = generation
        complete_save(temporary, checkpoint)
        _write_card(temporary, Path(directory).resolve().name, checkpoint, recipe, adapter=False)


def save_adapter(
    peft_model: PeftModel, directory: str | Path, *, checkpoint: Checkpoint, recipe: Mapping[str, Any] | None = None
) -> None:
    """Write a LoRA adapter, and what is needed to put it back on its base.

    Args:
        peft_model: the base with the adapter, not merged. A mask token's row is trained with peft's
            `trainable_token_indices`; no embedding matrix is saved.
        directory: new, empty, or an earlier checkpoint of ours, which is replaced when all is written.
        checkpoint: the base as it was loaded, its mask token added, its config what the adapter was trained for.
        recipe: how it was made, for the card.

    Raises:
        FastDLLMError: when the directory is someone else's or cannot be written, when the base has no name to be
            found by again, or when the adapter would hold a whole embedding.
    """
    if checkpoint.source is None:
        raise FastDLLMError("the adapter's base has no name to be found by again; save the whole model instead")
    with whole_directory(directory) as temporary, quiet():
        peft_model.save_pretrained(temporary, save_embedding_layers=False)
        _check_small(temporary, vocabulary_rows(checkpoint.model))
        complete_save(temporary, checkpoint)
        _write_card(temporary, Path(directory).resolve().name, checkpoint, recipe, adapter=True)


def complete_save(directory: Path, checkpoint: Checkpoint) -> None:
    """Make what transformers or peft saved a checkpoint of ours: what loading it needs beside its weights.

    Args:
        directory: with the config.json of a whole model, or the adapter_config.json of an adapter.
        checkpoint: as for `save_checkpoint`, or for `save_adapter`.
    """
    adapter, whole = directory / "adapter_config.json", directory / "config.json"
    if adapter.exists():
        _write_json(adapter, {**read_json(adapter), "base_model_name_or_path": checkpoint.source})
        _write_json(directory / BLOCK_DIFFUSION_FILE, _adapter_record(checkpoint))
    else:
        ours = {CONFIG_KEY: checkpoint.config.to_dict(), TRAINED_ON_KEY: written_trained_on(checkpoint)}
        _write_json(whole, {**read_json(whole), **ours})
    if checkpoint.tokenizer is not None:
        with quiet():
            checkpoint.tokenizer.save_pretrained(directory)


def _generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    config = checkpoint.model.config
    return GenerationConfig(
        bos_token_id=getattr(config, "bos_token_id", None),
        pad_token_id=getattr(config, "pad_token_id", None),
        eos_token_id=list(checkpoint.stop_token_ids) or None,
    )


def _adapter_record(checkpoint: Checkpoint) -> dict[str, Any]:
    tokenizer, mask = checkpoint.tokenizer, checkpoint.config.mask_token_id
    token = tokenizer.convert_ids_to_tokens(mask) if tokenizer is not None and mask is not None else None
    return {
        CONFIG_KEY: checkpoint.config.to_dict(),
        "base": checkpoint.source,
        "base_fingerprint": checkpoint.fingerprint,
        "mask_token": token,
        "mask_token_added": checkpoint.mask_token_added,
        "gated": gated_token(checkpoint.model) is not None,
        "stop_token_ids": list(checkpoint.stop_token_ids),
        TRAINED_ON_KEY: written_trained_on(checkpoint),
    }


def _check_small(directory: Path, rows: int) -> None:
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            shape = file.get_slice(name).get_shape()
            if len(shape) == 2 and shape[0] == rows and "lora" not in name:
                raise FastDLLMError(
                    f"{name}: the adapter would hold a whole embedding; train the mask token's row alone "
                    "(trainable_token_indices instead of modules_to_save)"
                )


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_card(
    directory: Path, title: str, checkpoint: Checkpoint, recipe: Mapping[str, Any] | None, *, adapter: bool
) -> None:
    text = model_card(title, checkpoint, recipe, adapter=adapter)
    (directory / "README.md").write_text(text, encoding="utf-8")
