"""Tiny random models, one per architecture, and a tokenizer that fits them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fast_dllm.checkpoint import add_mask_token, save_checkpoint
from fast_dllm.checkpoint.checkpoint import AUTOREGRESSIVE, Checkpoint

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "smollm2": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},  # QKV bias
    "qwen3": {"model_type": "qwen3", "head_dim": 8},  # QK norm
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SPECIAL = ("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,?!+-=*():'"


def tiny_model(
    architecture: str, *, vocab_size: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A two-layer random model in eval mode; every parameter is random (norms and biases too).

    Args:
        architecture: a key of `ARCHITECTURES`.
        vocab_size: rows of the embedding; `tiny_tokenizer` needs 54 of them.
        dtype: of the parameters.
        seed: the same seed gives the same weights.
        overrides: fields of the Hugging Face config.
    """
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": 1,
        **ARCHITECTURES[architecture],
        **overrides,
    }
    config = AutoConfig.for_model(**settings)
    attention = "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    model.eval()
    return model.to(dtype)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Characters (lower case) and ChatML's special tokens: 54 ids, `<|im_end|>` (3) ends a turn, no mask token."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    # BPE without merges: one token per character.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny(
    directory: Path,
    *,
    adapted: bool,
    context_attention: str = "block",
    architecture: str = "smollm2",
    **overrides: Any,
) -> str:
    """Save a tiny model with its tokenizer: a plain AR model, or one with a mask token and blocks of 16."""
    checkpoint = Checkpoint(
        model=tiny_model(architecture, **overrides),
        tokenizer=tiny_tokenizer(),
        config=AUTOREGRESSIVE,
        stop_token_ids=(3,),
        origin="a test",
    )
    if adapted:
        add_mask_token(checkpoint)
        checkpoint.config = replace(checkpoint.config, block_size=16, context_attention=context_attention)
    save_checkpoint(checkpoint, directory)
    return str(directory)
