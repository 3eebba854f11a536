"""A Hugging Face directory: any decoder-only architecture, from safetensors, complete or not at all."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fast_dllm.checkpoint import published
from fast_dllm.checkpoint.files import check_weight_files, first_line, has_tokenizer, read_json
from fast_dllm.errors import FastDLLMError

_LOADING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    ZeroDivisionError,
    SafetensorError,
)


def load_directory(
    directory: Path, dtype: torch.dtype | None, *, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model and, where there is one, its tokenizer.

    Raises:
        FastDLLMError: for anything that keeps the model from being exactly what its files say.
    """
    config = _read_config(directory, trust_remote_code=trust_remote_code)
    check_weight_files(directory)
    model, info = _load_model(directory, config, dtype, trust_remote_code=trust_remote_code)
    _check_complete(directory, info)
    check_finite(directory, model)
    return model, load_tokenizer(directory, config, trust_remote_code=trust_remote_code)


def load_tokenizer(
    directory: Path, config: PretrainedConfig | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """Load the directory's tokenizer; None when it has none.

    Raises:
        FastDLLMError: when it has one that cannot be read.
    """
    if not has_tokenizer(directory):
        return None
    try:
        return AutoTokenizer.from_pretrained(
            directory, config=config, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the Rust tokenizers raise bare Exception
        reason = first_line(error)
        raise FastDLLMError(f"{directory}: its tokenizer cannot be read ({reason}); copy it again") from error


def check_finite(place: Path, model: PreTrainedModel) -> None:
    """See that no weight is NaN or infinite.

    Raises:
        FastDLLMError: naming the first such weight.
    """
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise FastDLLMError(f"{place}: {name} holds NaN or infinite values; use an earlier checkpoint")


def _read_config(directory: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    path = directory / "config.json"
    values = read_json(path)
    model_type = values.get("model_type")
    if model_type == published.MODEL_TYPE:
        values = published.as_qwen2(values)
    elif model_type not in CONFIG_MAPPING:
        if "auto_map" not in values:
            raise FastDLLMError(
                f"{path}: unknown architecture model_type={model_type!r}; a newer transformers may know it"
            )
        if not trust_remote_code:
            raise FastDLLMError(
                f"{path}: model_type={model_type!r} needs code that comes with the checkpoint; "
                "read it, then allow it from Python: from_pretrained(..., trust_remote_code=True)"
            )
        try:
            return AutoConfig.from_pretrained(directory, trust_remote_code=True, local_files_only=True)
        except _LOADING_ERRORS as error:
            raise FastDLLMError(f"{path}: its own code failed ({first_line(error)})") from error
    try:
        config = CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except Exception as error:  # transformers validates configs with its own exception types
        raise FastDLLMError(f"{path}: invalid config ({first_line(error)})") from error
    _check_decoder_only(path, config)
    return config


def _check_decoder_only(path: Path, config: PretrainedConfig) -> None:
    # BERT and its kin have a causal head too; only `is_decoder` makes them decoders.
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if config.is_encoder_decoder or encoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise FastDLLMError(
            f"{path}: model_type={config.model_type!r} is not a decoder-only language model; "
            "take one such as Llama, Qwen or SmolLM2"
        )


def _load_model(
    directory: Path, config: PretrainedConfig, dtype: torch.dtype | None, *, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    # Code that came with the checkpoint decides for itself.
    attention = None if architecture is None else "sdpa" if architecture._supports_sdpa else "eager"
    try:
        # Sizes that differ are let through here, and refused by _check_complete with their names.
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype="auto" if dtype is None else dtype,
            attn_implementation=attention,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except _LOADING_ERRORS as error:
        raise FastDLLMError(f"{directory}: transformers cannot load it ({first_line(error)})") from error
    return model, info


def _check_complete(directory: Path, info: dict[str, Any]) -> None:
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, stored, expected = mismatched[0]
        raise FastDLLMError(
            f"{directory}: {name} has shape {_shape(stored)}, config.json asks for {_shape(expected)}; "
            "the config belongs to another model"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise FastDLLMError(
            f"{directory}: {len(missing)} weights are missing, first {missing[0]}; copy the checkpoint again, all of it"
        )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        raise FastDLLMError(
            f"{directory}: {len(unexpected)} weights have no place in the model of config.json, first {unexpected[0]}; "
            "the config belongs to another model"
        )


def _shape(size: Any) -> str:
    return "x".join(map(str, size))
