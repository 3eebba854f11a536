"""GGUF files for llama.cpp: the one a model came from, or its weights written anew in f16."""

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fast_dllm.checkpoint import smollm2_gguf
from fast_dllm.checkpoint.load import IN_THE_BOX, SMOLLM2_BASE
from fast_dllm.errors import FastDLLMError
from fast_dllm.files import unwritable
from fast_dllm.model.forward import head_width

_F16 = 1  # general.file_type
# Linear layers of a llama block: GGUF's name, ours, and whose heads its rows are.
_LINEAR = {
    "attn_q": ("self_attn.q_proj", "num_attention_heads"),
    "attn_k": ("self_attn.k_proj", "num_key_value_heads"),
    "attn_v": ("self_attn.v_proj", None),
    "attn_output": ("self_attn.o_proj", None),
    "ffn_gate": ("mlp.gate_proj", None),
    "ffn_up": ("mlp.up_proj", None),
    "ffn_down": ("mlp.down_proj", None),
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def gguf_of(model: str) -> Path:
    """The GGUF file behind a model: itself, or the one in the box (before adapting).

    Args:
        model: as a user names it.

    Raises:
        FastDLLMError: when there is none.
    """
    if model in (*IN_THE_BOX, SMOLLM2_BASE):
        return smollm2_gguf()
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    raise FastDLLMError("no GGUF file of this model is known")


def write_f16(model: PreTrainedModel, tokenizer: Any, path: Path) -> None:
    """Write a model for llama.cpp, matrices in f16.

    The tokenizer's part is taken over from the file in the box, so the vocabulary must be that one's.

    Args:
        model: of llama architecture, not quantised.
        tokenizer: of the model.
        path: the new file.

    Raises:
        FastDLLMError: for another architecture or vocabulary.
    """
    config = model.config
    check_writable(config, tokenizer)
    fields = _tokenizer_fields(tokenizer, config.vocab_size)
    writer = gguf.GGUFWriter(path, "llama")
    for key, (value, kind, item_kind) in fields.items():
        writer.add_key_value(key, value, kind, item_kind)
    _add_sizes(writer, config)
    for name, tensor in _tensors(model).items():
        writer.add_tensor(name, tensor.numpy())
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        writer.close()


def check_writable(config: Any, tokenizer: Any) -> None:
    """Refuse what `write_f16` cannot write, as far as that is seen without reading weights or files.

    Args:
        config: of a transformers model.
        tokenizer: of the model.

    Raises:
        FastDLLMError: for another architecture or vocabulary.
    """
    if config.model_type != "llama" or config.attention_bias or config.mlp_bias:
        raise FastDLLMError(f"writing a GGUF of architecture {config.model_type!r} with these options is not known")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise FastDLLMError(f"writing a GGUF with RoPE scaling {rope['rope_type']!r} is not known")
    if len(tokenizer) != config.vocab_size:
        raise FastDLLMError(
            f"{config.vocab_size} rows in the vocabulary, {len(tokenizer)} tokens: no GGUF is like that"
        )


def _tokenizer_fields(tokenizer: Any, vocabulary: int) -> dict[str, tuple[Any, Any, Any]]:
    source = gguf.GGUFReader(str(smollm2_gguf())).fields
    tokens = source["tokenizer.ggml.tokens"].contents()
    if len(tokens) != vocabulary or tokens != tokenizer.convert_ids_to_tokens(list(range(vocabulary))):
        raise FastDLLMError("no GGUF with this model's tokenizer is at hand")
    copied = {key: field for key, field in source.items() if key.startswith("tokenizer.")}
    return {
        key: (field.contents(), field.types[0], field.types[1] if len(field.types) > 1 else None)
        for key, field in copied.items()
    }


def _add_sizes(writer: Any, config: Any) -> None:
    head = head_width(config)
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_file_type(_F16)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope.get("rope_theta", 10_000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config
    weights: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tensors = {
        "token_embd.weight": weights["model.embed_tokens.weight"].half(),
        "output_norm.weight": weights["model.norm.weight"].float(),
    }
    if not config.tie_word_embeddings:
        tensors["output.weight"] = weights["lm_head.weight"].half()
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for name, source in _NORMS.items():
            tensors[f"{theirs}.{name}.weight"] = weights[f"{ours}.{source}.weight"].float()
        for name, (source, heads) in _LINEAR.items():
            weight = weights[f"{ours}.{source}.weight"].half()
            if heads is not None:
                weight = _interleave(weight, getattr(config, heads))
            tensors[f"{theirs}.{name}.weight"] = weight
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection as llama.cpp rotates them.

    RoPE turns pairs of rows: here row i of a head with row i + half, there rows 2i and 2i + 1.

    Args:
        weight: [heads * 2 * half, columns].
        heads: number of heads.
    """
    halves = weight.unflatten(0, (heads, 2, -1))
    return torch.stack((halves[:, 0], halves[:, 1]), dim=2).flatten(0, 2)
