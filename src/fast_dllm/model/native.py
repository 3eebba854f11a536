"""A lean forward for the Llama family: Llama, SmolLM2, Mistral, Qwen2, Qwen2.5, Qwen3.

One forward for all of them: QKV bias, QK norm, tied embeddings and RoPE variants are data. Positions of all rows run
through the linear layers together; only attention looks at rows. How a step is computed is decided elsewhere
(`steps.py`): by torch, or by our own CPU kernels.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fast_dllm.cache import KVCache
from fast_dllm.config import CacheDtype, ContextAttention
from fast_dllm.errors import FastDLLMError
from fast_dllm.gated_lora import gated_token
from fast_dllm.model.backbone import ForwardBatch
from fast_dllm.model.linear import Precision
from fast_dllm.model.steps import Kernels, choose_steps
from fast_dllm.model.weights import read_weights, unknown_to_native

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        self._steps, self.shape, self.kernels, self.cache_dtype = choose_steps(
            model, attention, precision=precision, kernels=kernels, compile=compile, cache_dtype=cache_dtype
        )
        self.vocabulary = self.shape.vocabulary
        self.likeliest, self.draft_budget = self._steps.likeliest, self._steps.draft_budget
        self._gated_token = gated_token(model)
        self._weights = read_weights(model, self.shape.dtype, self._steps.make_linear)
        self._rotary = model.model.rotary_emb
        self._cos = self._sin = torch.empty(0)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._weights.embedding.device

    def new_cache(self, slots: int, max_length: int) -> KVCache:
        """Allocate memory for K/V, laid out as what computes here wants it."""
        cache = self._steps.new_cache(slots, max_length)
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
        steps, weights = self._steps, self._weights
        plan = steps.plan(batch, cache, self._cos, self._sin, self._masked(batch.input_ids))
        hidden = steps.layers(weights.layers, F.embedding(batch.input_ids, weights.embedding), plan)
        if not len(batch.read):
            return hidden.new_empty(0, self.shape.vocabulary)
        logits = steps.linear(weights.head, hidden, weights.final_norm)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _masked(self, ids: Tensor) -> Tensor | None:
        """Where a gated adapter acts, bool [T]; None for nowhere."""
        if self._gated_token is None:
            return None
        # A GPU would keep the host waiting for the answer; on a CPU a list gives it in a fifth of the time torch takes.
        if ids.device.type == "cpu" and self._gated_token not in ids.tolist():
            return None
        return ids == self._gated_token
