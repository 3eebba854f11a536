"""A model whose weights are spread over processes (FSDP), put together again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import AutoModelForCausalLM, PreTrainedModel

from fast_dllm.errors import FastDLLMError

NO_FSDP1 = "FSDP's first version gathers weights in the forward of the whole alone: launch it with recipes/fsdp2.yaml"
NO_SHARDED_LORA = "a LoRA adapter is not sharded: launch it with recipes/ddp.yaml, or give --lora-rank 0"


def is_sharded(trainer: Any) -> bool:
    """Whether each process holds a part of the weights only."""
    return bool(trainer.is_fsdp_enabled)


def shards_of(save: Path) -> Path | None:
    """The directory of a save that holds the weights of a sharded run; None where they are whole."""
    shards = save / f"{FSDP_MODEL_NAME}_0"
    return shards if shards.exists() else None


def check_save(trainer: Any, save: Path | None) -> None:
    """Refuse a save that this trainer cannot go on from; None is the beginning of a run.

    Raises:
        FastDLLMError: for one whose weights are spread over processes where the trainer's are whole, or the reverse.
    """
    if save is None:
        return
    if is_sharded(trainer) and shards_of(save) is None:
        raise FastDLLMError(f"{save}: the run began without FSDP; go on with recipes/ddp.yaml, or in one process")
    if not is_sharded(trainer) and shards_of(save) is not None:
        raise FastDLLMError(f"{save}: the run began with FSDP; go on with recipes/fsdp2.yaml")


def add_up_as_one_process_does(trainer: Any, *, bfloat16: bool) -> None:
    """Let gradients be added up in float32, and after every forward, before the trainer has begun.

    accelerate would reduce them in bfloat16, and of the forwards of an update all but the last would leave the whole
    model's gradients on every device.

    Args:
        trainer: of a sharded run.
        bfloat16: of the arithmetic.
    """
    trainer.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    if bfloat16:
        plugin = trainer.accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


@contextmanager
def decodable(model: PreTrainedModel) -> Iterator[None]:
    """Let a sharded model be run by its parts, as decoding does; the weights of a layer are gathered when it is called.

    What has no unit of its own is gathered by the forward of the whole, which decoding does not call, so it is held
    gathered meanwhile. Every process must run the same forwards.

    Args:
        model: which has run a forward of the whole before. One that is not sharded is left alone.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


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
