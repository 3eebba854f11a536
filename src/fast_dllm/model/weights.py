"""The one place that knows transformers' names of a Llama-like model's weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fast_dllm.cache import LayerShape
from fast_dllm.gated_lora import LowRank, low_rank_of
from fast_dllm.model.forward import head_width
from fast_dllm.model.linear import AdaptedLinear, DenseLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MakeLinear = Callable[[Tensor, Tensor | None, LowRank | None], Any]

_KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# RoPE variants whose frequencies do not change with the length of the sequence.
_KNOWN_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Shape:
    """What a forward must know of a model besides its weights.

    Attributes:
        layers: how many.
        query_heads: of a layer.
        kv_heads: of a layer.
        head_dim: width of a head.
        vocabulary: rows of the embedding.
        norm_epsilon: of every RMSNorm.
        dtype: of activations.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    norm_epsilon: float
    dtype: torch.dtype

    @property
    def cached(self) -> LayerShape:
        """K/V of a layer."""
        return LayerShape(self.kv_heads, self.head_dim, self.head_dim)


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; its linear layers are as the backend of the forward made them.

    Attributes:
        qkv: queries, keys and values in one.
        out: of the attention.
        gate_up: gate and up projection in one.
        down: of the MLP.
        attention_norm: [H].
        mlp_norm: [H].
        query_norm: [head_dim], or None (Qwen3 has it).
        key_norm: [head_dim], or None.
    """

    qkv: Any
    out: Any
    gate_up: Any
    down: Any
    attention_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None


@dataclass(frozen=True)
class ModelWeights:
    """A decoder-only model of the Llama family.

    Attributes:
        layers: from the bottom.
        embedding: [vocabulary, H].
        final_norm: [H].
        head: H to vocabulary.
    """

    layers: list[LayerWeights]
    embedding: Tensor
    final_norm: Tensor
    head: Any


def unknown_to_native(model: "PreTrainedModel") -> str | None:
    """Why the native backbone cannot run a model; None if it can."""
    config = model.config
    if config.model_type not in _KNOWN_TYPES:
        return f"model type {config.model_type!r} is not one of {', '.join(_KNOWN_TYPES)}"
    if not type(model).__module__.startswith("transformers.models."):
        return f"it brings code of its own ({type(model).__name__})"
    if config.hidden_act != "silu":
        return f"its MLP uses {config.hidden_act!r}, not 'silu'"
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in _KNOWN_ROPE:
        return f"RoPE variant {kind!r} is not one of {', '.join(_KNOWN_ROPE)}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "its RoPE turns a part of each head only"
    if (kind := _other_linear(model)) is not None:
        return f"its weights are quantised ({kind})"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "it is spread over several devices"
    return None


def _other_linear(model: Any) -> str | None:
    """The class of a layer whose weight is no plain matrix; None where there is none."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        for module in (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            linear = getattr(module, "base_layer", module)
            # Quantised layers are subclasses.
            if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
                return type(linear).__name__
    return None


def read_shape(model: "PreTrainedModel", dtype: torch.dtype) -> Shape:
    """The shape of a model that `unknown_to_native` accepts, for activations of a dtype."""
    config = model.config
    return Shape(
        layers=config.num_hidden_layers,
        query_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_width(config),
        vocabulary=model.get_input_embeddings().weight.shape[0],
        norm_epsilon=config.rms_norm_eps,
        dtype=dtype,
    )


def read_weights(model: "PreTrainedModel", dtype: torch.dtype, make_linear: MakeLinear) -> ModelWeights:
    """Take the weights of a model that `unknown_to_native` accepts.

    Dense weights are shared: the model's own parameters become views of the fused ones. Packed and quantised weights
    are copies in another layout.

    Args:
        model: a transformers `...ForCausalLM`, adapters merged or gated.
        dtype: of embedding and norms.
        make_linear: makes a layer from a weight [O, I], a bias [O] and what a gated adapter adds.
    """
    decoder, head = model.model, model.lm_head
    return ModelWeights(
        layers=[_layer(layer, dtype, make_linear) for layer in decoder.layers],
        embedding=decoder.embed_tokens.weight.detach().to(dtype),
        final_norm=decoder.norm.weight.detach().to(dtype),
        head=make_linear(head.weight.detach(), _bias([head]), None),
    )


def _layer(layer: Any, dtype: torch.dtype, make_linear: MakeLinear) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp

    def norm(module: Any) -> Tensor | None:
        return None if module is None else module.weight.detach().to(dtype)

    return LayerWeights(
        qkv=_fused([attention.q_proj, attention.k_proj, attention.v_proj], make_linear),
        out=_fused([attention.o_proj], make_linear),
        gate_up=_fused([mlp.gate_proj, mlp.up_proj], make_linear),
        down=_fused([mlp.down_proj], make_linear),
        attention_norm=layer.input_layernorm.weight.detach().to(dtype),
        mlp_norm=layer.post_attention_layernorm.weight.detach().to(dtype),
        query_norm=norm(getattr(attention, "q_norm", None)),
        key_norm=norm(getattr(attention, "k_norm", None)),
    )


def _fused(modules: list[Any], make_linear: MakeLinear) -> Any:
    """Several layers with one input as one."""
    low_rank = _fused_low_rank(modules)
    modules = [getattr(module, "base_layer", module) for module in modules]  # peft wraps the layers it adapts
    weight = torch.cat([module.weight.detach() for module in modules])
    linear = make_linear(weight, _bias(modules), low_rank)
    if isinstance(linear.base if isinstance(linear, AdaptedLinear) else linear, DenseLinear):
        # The model would otherwise be in memory twice.
        parts = weight.split([module.weight.shape[0] for module in modules])
        for module, part in zip(modules, parts, strict=True):
            module.weight.data = part
    return linear


def _fused_low_rank(modules: list[Any]) -> LowRank | None:
    """What the adapters of several layers with one input add: each to its own outputs."""
    low_ranks = [low_rank_of(module) for module in modules]
    downs = [low_rank.down for low_rank in low_ranks if low_rank is not None]
    if not downs:
        return None
    ups = [
        downs[0].new_zeros(module.out_features, 0) if low_rank is None else low_rank.up
        for module, low_rank in zip(modules, low_ranks, strict=True)
    ]
    return LowRank(torch.cat(downs), torch.block_diag(*ups))


def _bias(modules: list[Any]) -> Tensor | None:
    if modules[0].bias is None:
        return None
    return torch.cat([module.bias.detach() for module in modules])
