"""Casting a model's weights."""

import torch
from transformers import PreTrainedModel


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the parameters in place, and nothing else.

    `model.to(dtype)` would also cast buffers: RoPE frequencies in bfloat16 turn far positions by other angles than
    the same model has when transformers loads it in bfloat16.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model
