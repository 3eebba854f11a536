"""LoRA on all linear layers, with the mask token's embedding row trained too."""

from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model

from fast_dllm.checkpoint import Checkpoint, is_gated, load_adapter_base, load_checkpoint
from fast_dllm.checkpoint.directory import BLOCK_DIFFUSION_FILE
from fast_dllm.checkpoint.quiet import quiet
from fast_dllm.errors import FastDLLMError
from fast_dllm.gated_lora import gate_adapter, gated_token
from fast_dllm.training.options import AdaptOptions
from fast_dllm.training.trained_rows import train_rows_alone


def open_adapter(source: str | Path, options: AdaptOptions) -> tuple[Checkpoint, Path | None]:
    """Load what is to be trained: a model, or the base of an adapter that is to be trained on.

    An adapter that acts everywhere is merged where a gated one goes on top of it, or all weights are trained; and one
    that was not trained here always is.

    Args:
        source: what `load_checkpoint` takes.
        options: of the run.

    Returns:
        The checkpoint and, where `source` is an adapter to go on with, its directory.

    Raises:
        FastDLLMError: when the source is unusable, or a gated adapter that is to act everywhere.
    """
    path, dtype = Path(source), options.loading_dtype
    is_adapter = (path / "adapter_config.json").exists()
    # Of another tool's adapter the mask token's row is not trained, nor perhaps most layers.
    is_ours = (path / BLOCK_DIFFUSION_FILE).exists()
    if is_adapter and is_ours and options.lora_rank and is_gated(path) == options.gated_lora:
        return load_adapter_base(path, dtype=dtype, base=options.base), path
    checkpoint = load_checkpoint(source, dtype=dtype, base=options.base)
    if gated_token(checkpoint.model) is not None:
        remedy = "go on training it with --gated-lora" if is_adapter else f"train one on {checkpoint.base}"
        raise FastDLLMError(f"{source}: has a gated adapter already; {remedy}")
    return checkpoint, None


def wrap_with_lora(model: Any, mask_token_id: int | None, options: AdaptOptions, adapter: Path | None) -> PeftModel:
    """Put a LoRA adapter on a model.

    Args:
        model: the frozen base.
        mask_token_id: its embedding row is trained; the rest of the embedding is not.
        options: rank and scale, and where it acts.
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
    # Else each save of a run asks the hub how many rows the base had, and holds the whole embedding if it has more now.
    wrapped.save_pretrained = partial(wrapped.save_pretrained, save_embedding_layers=False)
    train_rows_alone(wrapped)
    for module in wrapped.modules():
        if options.dtype == "bfloat16" and hasattr(module, "lora_A"):
            # Autocast would only cast the activations back from the adapter's float32.
            module.cast_input_dtype_enabled = False
    if options.gated_lora and mask_token_id is not None:
        gate_adapter(wrapped.get_base_model(), mask_token_id)
    return wrapped
