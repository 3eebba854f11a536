"""`fast-dllm info`: what a checkpoint is."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fast_dllm.cli.options import BaseOption, MaskOption, ModelArgument
from fast_dllm.config import DecodingConfig

if TYPE_CHECKING:
    from fast_dllm.checkpoint import Checkpoint


def info(
    model: ModelArgument,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    mask_token_id: MaskOption = None,
    base: BaseOption = None,
) -> None:
    """Tell what a model is.

    Its architecture and size, block size, mask token, stop tokens, longest context and, of a LoRA adapter, the base.
    """
    from fast_dllm.checkpoint import load_checkpoint

    facts = _facts(load_checkpoint(model, mask_token_id=mask_token_id, base=base))
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name.replace('_', ' '):<{width}}  {_plain(value)}")


def _facts(checkpoint: "Checkpoint") -> dict[str, Any]:
    from fast_dllm.api import why_not_native

    model, config = checkpoint.model, checkpoint.config
    text_config = model.config.get_text_config()
    facts: dict[str, Any] = {
        "origin": checkpoint.origin,
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "layers": text_config.num_hidden_layers,
        "vocabulary": text_config.vocab_size,
        "block_size": config.block_size,
        "mask_token": None if config.mask_token_id is None else _token(checkpoint, config.mask_token_id),
        "token_shift": config.token_shift,
        "context_attention": config.context_attention,
        "verifies_drafts": config.block_size > 1 and DecodingConfig().verifies(config),
        "stop_tokens": [_token(checkpoint, token) for token in checkpoint.stop_token_ids],
        "max_length": checkpoint.max_length,
        "backbone": "native" if (why := why_not_native(checkpoint)) is None else f"hf: {why}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": checkpoint.fingerprint,
    }
    if checkpoint.base is not None:
        facts["base"] = checkpoint.base
        facts["base_fingerprint"] = facts.pop("fingerprint")
    return facts


def _token(checkpoint: "Checkpoint", token: int) -> dict[str, Any]:
    tokenizer = checkpoint.tokenizer
    return {"id": token, "text": None if tokenizer is None else tokenizer.convert_ids_to_tokens(token)}


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, dict):
        return f"{value['text']} ({value['id']})" if value["text"] is not None else str(value["id"])
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
