"""A loaded checkpoint, and what is read off its tokenizer and configs."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fast_dllm.config import BlockDiffusionConfig, TaskItems
from fast_dllm.errors import FastDLLMError

# Where config.json holds the BlockDiffusionConfig.
CONFIG_KEY = "block_diffusion"
# Where config.json, or an adapter's record, says which generated questions a model knows.
TRAINED_ON_KEY = "block_diffusion_trained_on"
# What an AR model is in the family of block diffusion models.
AUTOREGRESSIVE = BlockDiffusionConfig(mask_token_id=None, block_size=1, context_attention="causal")


@dataclass(kw_only=True)
class Checkpoint:
    """A model ready to run, with everything needed to decode from it, train it on and save it.

    Attributes:
        model: a Hugging Face causal LM in eval mode, adapters merged.
        tokenizer: None when the checkpoint has none.
        config: how it was adapted; `AUTOREGRESSIVE` for a plain AR model.
        stop_token_ids: tokens that end an answer.
        origin: one line: what it is and where it came from.
        source: what an adapter trained on it records as its base: a hub id, a name, or an absolute path.
        fingerprint: of the weights as loaded, an adapter's base's where there is one; tells an adapter whether this
            is its base.
        base: an adapter's base, by the name it was loaded from; None for a whole model.
        mask_token_added: the mask token was added to this vocabulary after loading.
        trained_on: generated questions of all its training, its base's included.
        stored_dtype: of the weights in their files, where those say it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    config: BlockDiffusionConfig
    stop_token_ids: tuple[int, ...]
    origin: str
    source: str | None = None
    fingerprint: str | None = None
    base: str | None = None
    mask_token_added: bool = False
    trained_on: tuple[TaskItems, ...] = ()
    stored_dtype: torch.dtype | None = None

    @property
    def max_length(self) -> int | None:
        """Longest usable context; None when the model states no limit.

        A sliding window limits it: inside the window sliding attention equals full attention, and our masks
        know only the latter. So does RoPE with other frequencies for long sequences: a longer row would change those
        of the rows beside it, and those that its own cached keys were turned by.
        """
        config = self.model.config.get_text_config()
        limits = [
            getattr(config, "max_position_embeddings", None),
            _active_sliding_window(config),
            _end_of_short_rope(config),
        ]
        return min((limit for limit in limits if limit is not None), default=None)


def _active_sliding_window(config: Any) -> int | None:
    window: int | None = getattr(config, "sliding_window", None)
    switched_off = getattr(config, "use_sliding_window", True) is False
    layer_types = getattr(config, "layer_types", None)
    no_layer = layer_types is not None and "sliding_attention" not in layer_types
    return None if switched_off or no_layer else window


def _end_of_short_rope(config: Any) -> int | None:
    """Up to which length "longrope" keeps its frequencies."""
    rope = getattr(config, "rope_parameters", None) or {}
    of_layers = rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]
    ends = [one.get("original_max_position_embeddings") for one in of_layers if one.get("rope_type") == "longrope"]
    return min((end for end in ends if end is not None), default=None)


def read_config(values: Any, path: Path) -> BlockDiffusionConfig:
    """The `BlockDiffusionConfig` in a file's "block_diffusion" section.

    Raises:
        FastDLLMError: naming the file, for a section that is no object, is incomplete, or has an unknown key.
    """
    where = f"{path}: {CONFIG_KEY}"
    if not isinstance(values, dict):
        raise FastDLLMError(f"{where}: must be an object, not {type(values).__name__}")
    if "mask_token_id" not in values:
        raise FastDLLMError(f"{where}: mask_token_id is missing; add the mask token's id")
    try:
        return BlockDiffusionConfig.from_dict(values, source=where)
    except FastDLLMError as error:
        raise FastDLLMError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


def read_trained_on(values: Any, path: Path) -> tuple[TaskItems, ...]:
    """The generated questions that a file says a model was trained on.

    Raises:
        FastDLLMError: naming the file, where it says something else.
    """
    try:
        return tuple(TaskItems(tuple(map(str, entry["tasks"])), int(entry["items"])) for entry in values)
    except (TypeError, KeyError, ValueError) as error:
        raise FastDLLMError(f'{path}: {TRAINED_ON_KEY}: must be a list of {{"tasks": [...], "items": ...}}') from error


def written_trained_on(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What `read_trained_on` reads."""
    return [asdict(entry) for entry in checkpoint.trained_on]


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Rows of the embedding, padding rows included: ids below it can be embedded."""
    return int(model.get_input_embeddings().weight.shape[0])


def find_stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Every token that the checkpoint's own files say ends an answer, in the order found.

    They are: eos of the generation config, of the model config and of the tokenizer, and the special token that
    the chat template puts after an assistant's text.
    """
    found: list[int] = []
    found += _as_ids(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    found += _as_ids(getattr(model.config, "eos_token_id", None))
    if tokenizer is not None:
        found += _as_ids(tokenizer.eos_token_id)
        found += _end_of_turn(tokenizer)
    rows = vocabulary_rows(model)
    return tuple(dict.fromkeys(token for token in found if 0 <= token < rows))


def _as_ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    if not getattr(tokenizer, "chat_template", None):
        return
    answer = "a1b2c3"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError):  # a template for other roles or tools only
        return
    ids = tokenizer(str(text).rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if ids and ids[0] in special:
        yield ids[0]
