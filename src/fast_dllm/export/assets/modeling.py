"""The model class of an exported checkpoint: its architecture's own, decoding by blocks.

Exported as `modeling_fast_dllm.py`, its base class and `MAX_LENGTH` replaced by the checkpoint's.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers import LlamaForCausalLM as Architecture
from transformers import __version__ as transformers_version

from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.errors import FastDLLMError
from fast_dllm.generation import decoding_from_call, generate_batch
from fast_dllm.masks import NOWHERE, dense_mask, sequence_tokens
from fast_dllm.model.forward import cache_argument
from fast_dllm.model.hf import HFBackbone

MAX_LENGTH: int | None = None
"""Longest usable context, in tokens."""

# Releases before 5 would load the weights and overlook the config's `rope_parameters`: wrong answers, no error.
if int(transformers_version.partition(".")[0]) < 5:
    raise ImportError(f"transformers {transformers_version} is too old for this model; install 5.10 or later")


# GenerationMixin is named again, or transformers would wrap a class that has a `generate` of its own in another one.
class BlockDiffusionForCausalLM(Architecture, GenerationMixin):  # type: ignore[misc]
    """A causal language model whose blocks see themselves in both directions, and are decoded in parallel."""

    # So that `save_pretrained` writes the code again: config.json names it.
    _auto_class = "AutoModelForCausalLM"

    @property
    def block_diffusion(self) -> BlockDiffusionConfig:
        """How the model was adapted, from config.json.

        Raises:
            FastDLLMError: for a section that is not valid.
        """
        return BlockDiffusionConfig.from_dict(self.config.block_diffusion, source="config.json: block_diffusion")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Logits under the checkpoint's own attention (block-causal, say), not shifted.

        With a cache or a 4-D mask it is the architecture's own forward.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L], 0 at padding; None for none; or 4-D, used as it is.
            position_ids: int64 [B, L]; None counts the tokens that are not padding, from 0.
            cache: of transformers.
            inputs_embeds: [B, L, H] instead of `input_ids`.
            labels: int64 [B, L] for the autoregressive loss; only where the context is token-causal.
            use_cache: None is false.
            past_key_values: name of `cache` before transformers 5.24. Both are taken in every release.
            **kwargs: of the architecture's forward.

        Raises:
            FastDLLMError: for labels that the model would see, or an attention other than SDPA.
        """
        cache = past_key_values if cache is None else cache
        if cache is not None:
            kwargs[cache_argument(Architecture)] = cache
        elif attention_mask is None or attention_mask.dim() == 2:
            given = input_ids if inputs_embeds is None else inputs_embeds
            if given is not None:
                attention_mask, position_ids = self._own_attention(given, attention_mask, position_ids, labels)
                use_cache = bool(use_cache)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            **kwargs,
        )

    def _own_attention(
        self, given: Tensor, padding_mask: Tensor | None, position_ids: Tensor | None, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The 4-D mask and the positions of a plain forward."""
        self._check_sdpa()
        config = self.block_diffusion
        if labels is not None and config.context_attention != "causal":
            raise FastDLLMError(
                f"labels: under {config.context_attention!r} attention a token sees its own label; train with "
                "fast-dllm, or load without trust_remote_code for autoregressive training"
            )
        present = torch.ones(given.shape[:2], device=given.device) if padding_mask is None else padding_mask
        present = present != 0
        if position_ids is None:
            position_ids = (present.long().cumsum(-1) - 1).clamp(min=0)
        tokens = sequence_tokens(position_ids, config.block_size)
        tokens = tokens._replace(document=torch.where(present, tokens.document, NOWHERE))
        return dense_mask(tokens, config.context_attention), position_ids

    def generate(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        tokenizer: Any = None,
        mask_id: int | None = None,
        return_dict: bool = False,
        max_batch: int = 32,
        **settings: Any,
    ) -> Any:
        """Decode by blocks.

        Args:
            input_ids: int64 [B, L].
            attention_mask: [B, L], 0 at padding, which decoding does not see; None for none.
            tokenizer: accepted for the published call; ids go in and out.
            mask_id: overrides the checkpoint's mask token.
            return_dict: return a `GenerateResult`: rows without padding, statistics, reveal steps, confidences.
            max_batch: prompts decoded at once.
            **settings: fields of `DecodingConfig` (max_new_tokens, small_block_size, threshold, block_size,
                temperature, top_p, top_k, ...), or the published `use_block_cache` and `stop_token`.

        Returns:
            int64 [B, longest]: `input_ids` as given, then the answer, then stop tokens up to the longest row; or a
            `GenerateResult`.

        Raises:
            FastDLLMError: for invalid prompts or settings, or an attention other than SDPA.
        """
        self._check_sdpa()
        decoding = decoding_from_call(**settings)
        if decoding.stop_strings:
            raise FastDLLMError("stop_strings need text; pass stop_token ids to generate")
        config = self.block_diffusion
        if mask_id is not None:
            config = replace(config, mask_token_id=mask_id)
        prompts = self._prompts(input_ids, attention_mask)
        backbone = HFBackbone(self, config.context_attention, MAX_LENGTH)
        stops = _as_tuple(self.generation_config.eos_token_id)
        result = generate_batch(backbone, config, prompts, decoding, stops, max_batch=max_batch)
        if return_dict:
            return result
        longest = max(len(answer) for answer in result.answers)
        pad = stops[0] if stops else 0
        answers = [answer + [pad] * (longest - len(answer)) for answer in result.answers]
        return torch.cat([input_ids, torch.tensor(answers, device=input_ids.device)], dim=-1)

    def _prompts(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
        """The rows without their padding."""
        if input_ids.dim() != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
            raise FastDLLMError("input_ids must be [batch, length], and attention_mask, where given, of that shape")
        rows = self.get_input_embeddings().num_embeddings
        if ((input_ids < 0) | (input_ids >= rows)).any():
            raise FastDLLMError(f"input_ids: an id is not in the vocabulary; ids run from 0 to {rows - 1}")
        if attention_mask is None:
            return input_ids.tolist()
        return [row[present != 0].tolist() for row, present in zip(input_ids, attention_mask, strict=True)]

    def _check_sdpa(self) -> None:
        # Eager attention would add our boolean mask to the scores: wrong, and silently so.
        if (found := self.config._attn_implementation) != "sdpa":
            raise FastDLLMError(f"attn_implementation={found!r}: blocks need 'sdpa'; load with it")


def _as_tuple(ids: int | Sequence[int] | None) -> tuple[int, ...]:
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
