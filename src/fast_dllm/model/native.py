"""A lean forward for the Llama family: Llama, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3.

One forward for all of them: QKV bias, QK norm, tied embeddings and RoPE variants are data. Positions of all rows run
through the linear layers together; only attention looks at rows. How a step is computed is its backend's affair:
torch, or our own CPU kernels.
"""

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from fast_dllm.cache import KVCache, LayerShape, SlabCache
from fast_dllm.config import CacheDtype, ContextAttention
from fast_dllm.errors import FastDLLMError
from fast_dllm.gated_lora import gated_token
from fast_dllm.model.backbone import DRAFTS_ON_CPU, ForwardBatch
from fast_dllm.model.compiled import CompiledOps, new_tiled_cache, why_not_compiled
from fast_dllm.model.cpu_cache import CpuCache
from fast_dllm.model.cpu_ops import HEAD_DIMS, CpuOps
from fast_dllm.model.kernels import why_no_kernels
from fast_dllm.model.linear import Precision
from fast_dllm.model.torch_ops import TorchOps
from fast_dllm.model.weights import Shape, read_shape, read_weights, unknown_to_native

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kernels = Literal["auto", "torch", "own"]


class NativeBackbone:
    """`Backbone` over the weights of a transformers model, without its modules.

    Attributes:
        attention: context attention of the checkpoint.
        max_length: longest sequence, in tokens.
        kernels: what computes it, in a few words.
        cache_dtype: of K/V in our own kernels; None where torch computes, in the dtype of the model.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        attention: ContextAttention,
        max_length: int | None = None,
        *,
        precision: Precision = "dense",
        kernels: Kernels = "auto",
        compile: bool = False,
        cache_dtype: CacheDtype | None = None,
    ) -> None:
        """Take a model's weights.

        Args:
            model: one that `unknown_to_native` accepts, in eval mode.
            attention: context attention of the checkpoint.
            max_length: longest sequence, in tokens.
            precision: "int8" quantises the linear layers; "dense" keeps the model's dtype.
            kernels: "own" takes our CPU kernels (int8 and bfloat16), "torch" torch's; "auto" our own where they run.
            compile: compile torch's steps (`compiled.py`) instead; on a GPU they replay CUDA graphs.
            cache_dtype: of K/V, in our own kernels only; None takes int8 beside weights in int8, else bfloat16.

        Raises:
            FastDLLMError: for a model that it does not know, or when the precision or the cache's dtype has no kernel
                on its device.
        """
        if (why := unknown_to_native(model)) is not None:
            raise FastDLLMError(f"the native backbone cannot run this model: {why}; use backbone='hf'")
        self.attention: ContextAttention = attention
        self.max_length = max_length
        shape = read_shape(model, model.dtype)
        self.vocabulary = shape.vocabulary
        why_not = _why_not_own(model, shape, precision)
        if compile:
            why_not = "compiled, as asked"
            if (why := why_not_compiled(model.device, shape.dtype, precision)) is not None:
                raise FastDLLMError(f"compile=True cannot run this model: {why}; leave it out")
        if kernels == "own" and why_not is not None:
            raise FastDLLMError(f"our CPU kernels cannot run this model: {why_not}; use kernels='torch'")
        own = kernels != "torch" and why_not is None
        why_no_choice = None if own else why_not or "torch computes, as asked"
        self.cache_dtype = _cache_dtype(cache_dtype, precision, why_no_choice)
        if own or precision == "int8":
            shape = read_shape(model, torch.float32)
        self.kernels = "own CPU kernels" if own else f"torch ({why_not or 'as asked'})"
        self.shape = shape
        self._ops: Any
        if compile:
            self._ops = CompiledOps(shape, attention)
        elif own:
            self._ops = CpuOps(shape, attention, int8=precision == "int8")
        else:
            self._ops = TorchOps(shape, attention, precision)
        self.likeliest = self._ops.likeliest if own else None
        self.draft_budget = self._ops.draft_budget if own else DRAFTS_ON_CPU if model.device.type == "cpu" else None
        self._gated_token = gated_token(model)
        self._weights = read_weights(model, shape.dtype, self._ops.make_linear)
        self._rotary = model.model.rotary_emb
        self._cos = self._sin = torch.empty(0)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._weights.embedding.device

    def new_cache(self, slots: int, max_length: int) -> KVCache:
        """Allocate memory for K/V, laid out as what computes here wants it."""
        shape = self.shape
        layer = LayerShape(shape.kv_heads, shape.head_dim, shape.head_dim)
        if isinstance(self._ops, CpuOps):
            cache: KVCache = CpuCache(shape.layers, layer, slots, max_length, int8=self.cache_dtype == "int8")
        else:
            new = new_tiled_cache if isinstance(self._ops, CompiledOps) else SlabCache
            cache = new([layer] * shape.layers, slots, max_length, dtype=self._ops.cache_dtype, device=self.device)
        if cache.max_length > len(self._cos):
            self._tabulate_rope(cache.max_length)
        return cache

    @torch.inference_mode()
    def _tabulate_rope(self, length: int) -> None:
        positions = torch.arange(length, device=self.device)[None]
        tables = self._rotary(self._weights.embedding[:1, None], positions)
        # Half of each table repeats the other half.
        self._cos, self._sin = (table[0, :, : table.shape[-1] // 2].contiguous() for table in tables)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Run the rows (see `Backbone.forward`).

        Returns:
            [N, vocabulary], float32 or the model's dtype if wider.
        """
        ops, weights = self._ops, self._weights
        plan = ops.plan(batch, cache, self._cos, self._sin, self._masked(batch.input_ids))
        hidden: Tensor = ops.layers(weights.layers, F.embedding(batch.input_ids, weights.embedding), plan)
        if not len(batch.read):
            return hidden.new_empty(0, self.shape.vocabulary)
        logits: Tensor = ops.linear(weights.head, hidden, weights.final_norm)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _masked(self, ids: Tensor) -> Tensor | None:
        """Where a gated adapter acts, bool [T]; None for nowhere."""
        if self._gated_token is None:
            return None
        # A GPU would keep the host waiting for the answer; on a CPU a list gives it in a fifth of the time torch takes.
        if ids.device.type == "cpu" and self._gated_token not in ids.tolist():
            return None
        return ids == self._gated_token


def _cache_dtype(wanted: CacheDtype | None, precision: Precision, why_not_own: str | None) -> CacheDtype | None:
    """The dtype of K/V in our own kernels; None without them."""
    if wanted not in (None, *get_args(CacheDtype)):
        raise FastDLLMError(f"cache_dtype={wanted!r}: must be {' or '.join(map(repr, get_args(CacheDtype)))}")
    if wanted is not None and why_not_own is not None:
        raise FastDLLMError(f"cache_dtype={wanted!r} needs our own CPU kernels ({why_not_own}); leave it out")
    if why_not_own is not None:
        return None
    return wanted or ("int8" if precision == "int8" else "bfloat16")


def _why_not_own(model: "PreTrainedModel", shape: Shape, precision: Precision) -> str | None:
    if model.device.type != "cpu":
        return f"it is on {model.device.type}"
    if shape.head_dim not in HEAD_DIMS:
        return f"heads {shape.head_dim} wide are not among {', '.join(map(str, HEAD_DIMS))}"
    if precision != "int8" and model.dtype != torch.bfloat16:
        return f"they compute in int8 or bfloat16, not {str(model.dtype).removeprefix('torch.')}"
    return why_no_kernels()
