"""LoRA on all linear layers, with the mask token's embedding row trained too."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fast_dllm.checkpoint import Checkpoint, load_adapter_base, load_checkpoint
from fast_dllm.checkpoint.quiet import quiet
from fast_dllm.training.options import AdaptOptions


def open_adapter(source: str | Path, dtype: torch.dtype) -> tuple[Checkpoint, Path | None]:
    """Load what is to be trained: a model, or the base of an adapter that is to be trained on.

    Args:
        source: what `load_checkpoint` takes.
        dtype: of the weights.

    Returns:
        The checkpoint and, where `source` is an adapter, its directory.
    """
    path = Path(source)
    if (path / "adapter_config.json").exists():
        return load_adapter_base(path, dtype=dtype), path
    return load_checkpoint(source, dtype=dtype), None


def wrap_with_lora(model: Any, mask_token_id: int | None, options: AdaptOptions, adapter: Path | None) -> PeftModel:
    """Put a LoRA adapter on a model.

    Args:
        model: the frozen base.
        mask_token_id: its embedding row is trained; the rest of the embedding is not.
        options: rank and scale.
        adapter: an adapter to go on with, instead of a fresh one.

    Returns:
        The peft model, adapter weights in float32.
    """
    if adapter is not None:
        with quiet():
            wrapped = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    else:
        # peft names layers by suffix; the embedding's own name differs between families.
        embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        rows = None if mask_token_id is None else {embedding.rsplit(".", 1)[-1]: [mask_token_id]}
        alpha = 2 * options.lora_rank if options.lora_alpha is None else options.lora_alpha
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=options.lora_rank,
            lora_alpha=alpha,
            target_modules="all-linear",
            trainable_token_indices=rows,
        )
        with quiet():
            wrapped = get_peft_model(model, config)
    for module in wrapped.modules():
        if options.dtype == "bfloat16" and hasattr(module, "lora_A"):
            # Autocast would only cast the activations back from the adapter's float32.
            module.cast_input_dtype_enabled = False
    return wrapped
