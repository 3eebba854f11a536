"""What computes the steps of a native forward: torch, torch compiled, or our own CPU kernels."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from fast_dllm.cache import KVCache
from fast_dllm.config import CacheDtype, ContextAttention
from fast_dllm.errors import FastDLLMError
from fast_dllm.gated_lora import LowRank
from fast_dllm.model.backbone import ForwardBatch, Likeliest
from fast_dllm.model.compiled import CompiledOps, why_not_compiled
from fast_dllm.model.cpu_ops import HEAD_DIMS, CpuOps
from fast_dllm.model.kernels import why_no_kernels
from fast_dllm.model.linear import Precision
from fast_dllm.model.torch_ops import TorchOps
from fast_dllm.model.weights import LayerWeights, Shape, read_shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kernels = Literal["auto", "torch", "own"]


class Steps(Protocol):
    """The steps of a forward. A layer, a cache and a plan are of the kind that its own methods make."""

    @property
    def draft_budget(self) -> int | None:
        """See `Backbone.draft_budget`."""
        ...

    @property
    def likeliest(self) -> Likeliest | None:
        """See `Backbone.likeliest`."""
        ...

    def make_linear(self, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None = None) -> Any:
        """A layer from weights [O, I], bias [O] and what a gated adapter adds."""
        ...

    def new_cache(self, slots: int, max_length: int) -> KVCache:
        """Memory for K/V, laid out as these steps want it."""
        ...

    def plan(self, batch: ForwardBatch, cache: Any, cos: Tensor, sin: Tensor, masked: Tensor | None = None) -> Any:
        """Prepare a forward.

        Args:
            batch: of the forward.
            cache: to write to, and to look at.
            cos: [positions, E / 2].
            sin: the same.
            masked: bool [T], where a gated adapter acts; None for nowhere.
        """
        ...

    def layers(self, layers: Sequence[LayerWeights], hidden: Tensor, plan: Any) -> Tensor:
        """All layers, over the embedded positions [T, H], which are overwritten; what comes out at `read`: [N, H]."""
        ...

    def linear(self, layer: Any, hidden: Tensor, norm: Tensor) -> Tensor:
        """A layer over normalised [T, I]: [T, O]."""
        ...


class Chosen(NamedTuple):
    """The steps that a model gets.

    Attributes:
        steps: they.
        shape: of the model, with the dtype of their activations.
        name: what computes, in a few words.
        cache_dtype: of K/V in our own kernels; None where torch computes, in the dtype of the model.
    """

    steps: Steps
    shape: Shape
    name: str
    cache_dtype: CacheDtype | None


def choose_steps(
    model: "PreTrainedModel",
    attention: ContextAttention,
    *,
    precision: Precision,
    kernels: Kernels,
    compile: bool,
    cache_dtype: CacheDtype | None,
) -> Chosen:
    """Choose the steps for a model (arguments as for `NativeBackbone`).

    Raises:
        FastDLLMError: when what is asked cannot compute this model here.
    """
    shape = read_shape(model, model.dtype)
    why_not_own = _why_not_own(model, shape, precision)
    if compile:
        if (why := why_not_compiled(model.device, shape.dtype, precision)) is not None:
            raise FastDLLMError(f"compile=True cannot run this model: {why}; leave it out")
        why_not_own = "compiled, as asked"
    elif kernels == "torch":
        why_not_own = why_not_own or "as asked"
    if kernels == "own" and why_not_own is not None:
        raise FastDLLMError(f"our CPU kernels cannot run this model: {why_not_own}; use kernels='torch'")
    of_cache = _cache_dtype(cache_dtype, precision, why_not_own)
    if why_not_own is None or precision == "int8":
        shape = read_shape(model, torch.float32)
    if why_not_own is None:
        own = CpuOps(shape, attention, int8=precision == "int8", int8_cache=of_cache == "int8")
        return Chosen(own, shape, "own CPU kernels", of_cache)
    if compile:
        steps: Steps = CompiledOps(shape, attention, model.device)
    else:
        steps = TorchOps(shape, attention, model.device, precision)
    return Chosen(steps, shape, f"torch ({why_not_own})", None)


def _cache_dtype(wanted: CacheDtype | None, precision: Precision, why_not_own: str | None) -> CacheDtype | None:
    """The dtype of K/V in our own kernels; None without them."""
    if wanted not in (None, *get_args(CacheDtype)):
        raise FastDLLMError(f"cache_dtype={wanted!r}: must be {' or '.join(map(repr, get_args(CacheDtype)))}")
    if why_not_own is None:
        return wanted or ("int8" if precision == "int8" else "bfloat16")
    if wanted is not None:
        raise FastDLLMError(
            f"cache_dtype={wanted!r} needs our own CPU kernels, and torch computes ({why_not_own}); leave it out"
        )
    return None


def _why_not_own(model: "PreTrainedModel", shape: Shape, precision: Precision) -> str | None:
    if model.device.type != "cpu":
        return f"it is on {model.device.type}"
    if shape.head_dim not in HEAD_DIMS:
        return f"heads {shape.head_dim} wide are not among {', '.join(map(str, HEAD_DIMS))}"
    if precision != "int8" and model.dtype != torch.bfloat16:
        return f"they compute in int8 or bfloat16, not {str(model.dtype).removeprefix('torch.')}"
    return why_no_kernels()
