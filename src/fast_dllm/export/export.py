"""`export_checkpoint`: an adapted model for plain transformers, without fast-dllm."""

import json
from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from fast_dllm.checkpoint import Checkpoint, save_checkpoint
from fast_dllm.checkpoint.directory import whole_directory
from fast_dllm.errors import FastDLLMError
from fast_dllm.export.card import export_card
from fast_dllm.export.sources import MODELING_FILE, exported_sources

_CLASS = "BlockDiffusionForCausalLM"


def export_checkpoint(checkpoint: Checkpoint, directory: str | Path) -> None:
    """Write a model that transformers loads and decodes with `trust_remote_code=True`, where fast-dllm is not.

    Our decoding modules go into the directory as they are. The architecture's `model_type` stays, so that without
    trust the directory is the plain autoregressive model, and `load_checkpoint` reads it as any checkpoint of ours.

    Args:
        checkpoint: an adapted model, adapters merged.
        directory: new, empty, or an earlier checkpoint of ours, which is replaced when all is written.

    Raises:
        FastDLLMError: for a model that was not adapted or that runs code of its own, or when the directory is
            someone else's or cannot be written.
    """
    if checkpoint.config.mask_token_id is None:
        raise FastDLLMError(f"{checkpoint.origin}: an autoregressive model; adapt it first (fast-dllm adapt)")
    sources = exported_sources(_architecture(checkpoint), checkpoint.max_length)
    target = Path(directory).expanduser().resolve()
    with whole_directory(target) as temporary:
        save_checkpoint(checkpoint, temporary)
        for name, text in sources.items():
            (temporary / name).write_text(text, encoding="utf-8")
        _name_class(temporary / "config.json")
        (temporary / "README.md").write_text(export_card(target.name, checkpoint), encoding="utf-8")


def _architecture(checkpoint: Checkpoint) -> str:
    model: PreTrainedModel = checkpoint.model
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    if architecture is None or not isinstance(model, architecture):
        raise FastDLLMError(
            f"{checkpoint.origin}: {type(model).__name__} is not a causal language model of transformers itself; "
            "only those can be exported"
        )
    return str(architecture.__name__)


def _name_class(path: Path) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    values["architectures"] = [_CLASS]
    values["auto_map"] = {"AutoModelForCausalLM": f"{Path(MODELING_FILE).stem}.{_CLASS}"}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
