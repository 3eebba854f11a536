"""A model whose weights are spread over processes (FSDP), put together again."""

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel


def is_sharded(trainer: Any) -> bool:
    """Whether each process holds a part of the weights only."""
    return bool(trainer.is_fsdp_enabled)


def gather(trainer: Any) -> PreTrainedModel:
    """The whole model on the CPU of the first process. Every process must call it.

    Returns:
        The model with its architecture's own forward; on the other processes its weights are on the meta device.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(trainer.model, options=whole)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(trainer.model.config)
    if trainer.accelerator.is_main_process:
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
    return model
