"""Hashes of weights: a cheap one that tells one base model from another, and one of every value."""

import hashlib
import json

import torch
from transformers import PreTrainedModel

_SHAPE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_TENSORS = 8
_VALUES = 64


def fingerprint(model: PreTrainedModel) -> str:
    """Hash of the config's shape and of 64 values of each of 8 weights, from the first to the last.

    Values are compared as float32 rounded to bfloat16, so that the same weights loaded in another dtype have the
    same fingerprint. Take it before the vocabulary is resized.
    """
    config = model.config.get_text_config()
    digest = hashlib.sha256(json.dumps([getattr(config, key, None) for key in _SHAPE]).encode())
    # Vectors (norms, biases) are skipped: they often start out alike in all models of a family.
    matrices = [(name, weight) for name, weight in model.named_parameters() if weight.ndim >= 2]
    step = max(1, (len(matrices) - 1) // (_TENSORS - 1))
    for name, weight in matrices[::step]:
        values = weight.detach().reshape(-1)
        stride = max(1, values.numel() // _VALUES)
        sample = values[::stride][:_VALUES].float().to(torch.bfloat16).float()
        digest.update(name.encode())
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def digest(model: PreTrainedModel) -> str:
    """Hash of every weight as it stands, those of an adapter on it too: tells a model from one trained further."""
    found = hashlib.sha256()
    for name, weight in model.named_parameters():
        found.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        found.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:32]
