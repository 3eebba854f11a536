"""`BlockDiffusionLM`: load, decode, chat, stream, save. What the README shows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

from fast_dllm.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fast_dllm.config import ONE_AT_A_TIME, BlockDiffusionConfig, CacheDtype, DecodingConfig
from fast_dllm.errors import FastDLLMError
from fast_dllm.generation import GenerateResult, decoding_from_call, for_each, generate_batch, make_engine, naming
from fast_dllm.masks import dense_mask, sequence_tokens
from fast_dllm.model.backbone import Backbone
from fast_dllm.model.forward import head_logits, hidden_states
from fast_dllm.model.hf import HFBackbone
from fast_dllm.model.linear import Precision
from fast_dllm.model.native import NativeBackbone
from fast_dllm.model.weights import unknown_to_native
from fast_dllm.streaming import Reply, TextEvent, TextStream
from fast_dllm.text import ChatText

__all__ = [
    "BlockDiffusionLM",
    "GenerateResult",
    "Messages",
    "Mode",
    "Prompt",
    "Reply",
    "TextEvent",
    "TextStream",
]

Mode = Literal["diffusion", "ar"]
BackboneName = Literal["auto", "native", "hf"]
Messages = Sequence[Mapping[str, str]]
Prompt = Sequence[int] | Tensor | Messages


class BlockDiffusionLM:
    """A language model that decodes a block at a time, many tokens per forward.

    Attributes:
        config: block size, mask token and attention of the checkpoint.
        checkpoint: model, tokenizer and where they came from.
        backbone: the model as the decode loop runs it.
    """

    def __init__(self, checkpoint: Checkpoint, backbone: Backbone | None = None) -> None:
        """Wrap a loaded checkpoint; `from_pretrained` is the usual way."""
        self.checkpoint = checkpoint
        self.config: BlockDiffusionConfig = checkpoint.config
        self.tokenizer = checkpoint.tokenizer
        self.backbone: Backbone = make_backbone(checkpoint) if backbone is None else backbone
        self._text = None if self.tokenizer is None else ChatText(self.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        backbone: BackboneName = "auto",
        device: str | torch.device | None = None,
        mask_token_id: int | None = None,
        block_size: int | None = None,
        token_shift: bool | None = None,
        context_attention: str | None = None,
        base: str | Path | None = None,
        trust_remote_code: bool = False,
        compile: bool = False,
        cache_dtype: CacheDtype | None = None,
    ) -> "BlockDiffusionLM":
        """Load a model.

        Args:
            source: a Hugging Face directory or hub id, a GGUF file, an adapted checkpoint, a LoRA adapter, or
                "smollm2" (the model in the box), "smollm2-ar" or "smollm2-base".
            dtype: "float32", "bfloat16", "float16"; None takes the stored one. "int8" quantises the linear layers
                (a scale per output, and per position) and needs the native backbone.
            backbone: "hf" runs transformers' own modules, "native" a lean forward for the Llama family; "auto" takes
                the native one where it knows the model (`fast-dllm info` says why where it does not).
            device: where to run; None takes an accelerator if there is one, and for "int8" the CPU, its only place.
            mask_token_id: for checkpoints that do not name their mask token.
            block_size: overrides the checkpoint's.
            token_shift: overrides the checkpoint's.
            context_attention: overrides the checkpoint's.
            base: where a LoRA adapter's base is, if not where it was.
            trust_remote_code: run code from the checkpoint; off unless you trust it.
            compile: compile the native backbone's torch path; the first forwards take seconds each, and on a GPU later
                ones replay CUDA graphs.
            cache_dtype: "int8" keeps K/V in 8 bits (a scale per position and head), half the memory and faster behind
                long contexts; "bfloat16" does not round them. Both need our own CPU kernels. None takes int8 beside
                weights in int8, else bfloat16, and the model's dtype where torch computes.

        Raises:
            FastDLLMError: when the checkpoint is missing, broken or unknown.
        """
        if backbone not in get_args(BackboneName):
            raise FastDLLMError(f"backbone={backbone!r}: must be 'auto', 'native' or 'hf'")
        int8 = dtype == "int8"
        checkpoint = load_checkpoint(
            source,
            dtype=None if int8 else dtype,
            mask_token_id=mask_token_id,
            block_size=block_size,
            token_shift=token_shift,
            context_attention=context_attention,
            base=base,
            trust_remote_code=trust_remote_code,
        )
        checkpoint.model.to(_default_device(int8=int8) if device is None else device)
        return cls(checkpoint, make_backbone(checkpoint, backbone, int8=int8, compile=compile, cache_dtype=cache_dtype))

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None) -> CausalLMOutput:
        """Logits under the checkpoint's own attention (block-causal, say), without a cache.

        Args:
            input_ids: int64 [B, L], unpadded.
            position_ids: int64 [B, L]; None counts from 0.

        Returns:
            An output whose `logits` are [B, L, V], not shifted.
        """
        model = self.checkpoint.model
        input_ids = input_ids.to(model.device)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=model.device).expand_as(input_ids)
        tokens = sequence_tokens(position_ids, self.config.block_size)
        mask = dense_mask(tokens, self.config.context_attention)
        return CausalLMOutput(logits=head_logits(model, hidden_states(model, input_ids, position_ids, mask)))

    @overload
    def generate(self, input_ids: Any, *, return_dict: Literal[True], **settings: Any) -> GenerateResult: ...

    @overload
    def generate(self, input_ids: Any, *, return_dict: Literal[False] = False, **settings: Any) -> Any: ...

    def generate(
        self,
        input_ids: Tensor | Sequence[int] | Sequence[Sequence[int]],
        *,
        tokenizer: Any = None,
        mask_id: int | None = None,
        return_dict: bool = False,
        max_batch: int = 32,
        **settings: Any,
    ) -> Any:
        """Decode token ids; the call of the published model card works unchanged.

        Args:
            input_ids: [L] or [B, L] ids, or a list of unequal prompts.
            tokenizer: accepted for the published call; ids go in and out.
            mask_id: overrides the checkpoint's mask token.
            return_dict: return a `GenerateResult` (rows, statistics, reveal steps, confidences).
            max_batch: prompts decoded at once.
            **settings: fields of `DecodingConfig` (max_new_tokens, small_block_size, threshold, block_size,
                temperature, top_p, top_k, ...), or the published `use_block_cache` and `stop_token`.

        Returns:
            Ids, prompt included: a tensor [B, longest] for a tensor (rows padded on the right with a stop token),
            lists for lists; or a `GenerateResult`.

        Raises:
            FastDLLMError: for invalid settings or prompts.
        """
        decoding = decoding_from_call(**settings)
        if decoding.stop_strings:
            raise FastDLLMError("stop_strings need text: use chat or stream, or pass stop_token ids to generate")
        config = self.config if mask_id is None else replace(self.config, mask_token_id=mask_id)
        prompts = _prompt_rows(input_ids)
        stops = self.checkpoint.stop_token_ids
        result = generate_batch(self.backbone, config, prompts, decoding, stops, max_batch=max_batch)
        if return_dict:
            return result
        if isinstance(input_ids, Tensor):
            return _as_tensor(result.sequences, input_ids, pad=stops[0] if stops else 0)
        return result.sequences if input_ids and not isinstance(input_ids[0], int) else result.sequences[0]

    def stream(self, prompt: Prompt, decoding: DecodingConfig | None = None) -> TextStream:
        """Decode one prompt; iterating yields every forward with the text that became final by it.

        Args:
            prompt: messages (the tokenizer's chat template is applied), or token ids.
            decoding: settings; None takes the defaults.

        Raises:
            FastDLLMError: for invalid prompts or settings, or text without a tokenizer.
        """
        return self._open([prompt], DecodingConfig() if decoding is None else decoding, max_batch=1)

    def answers(
        self,
        prompts: Sequence[Prompt],
        decoding: DecodingConfig | Sequence[DecodingConfig] | None = None,
        *,
        max_batch: int = 32,
    ) -> Iterator[Reply]:
        """Answer many prompts, several at once.

        Args:
            prompts: conversations or token ids.
            decoding: settings of all, where prompt i draws from seed + i; or of each.
            max_batch: prompts decoded at once.

        Returns:
            The replies, in the order of the prompts, as they become ready.

        Raises:
            FastDLLMError: as for `stream`, naming the prompt by its number.
        """
        return self._open(prompts, DecodingConfig() if decoding is None else decoding, max_batch=max_batch).replies()

    def chat(self, messages: Messages, max_new_tokens: int = 256, mode: Mode = "diffusion", **settings: Any) -> Reply:
        """Answer a conversation.

        Args:
            messages: [{"role": ..., "content": ...}, ...].
            max_new_tokens: limit of the answer.
            mode: "diffusion" decodes in blocks as the checkpoint was trained; "ar" one token at a time with the
                same weights and engine.
            **settings: fields of `DecodingConfig`.

        Raises:
            FastDLLMError: for invalid messages or settings, or a checkpoint without a tokenizer.
        """
        if mode not in ("diffusion", "ar"):
            raise FastDLLMError(f"mode={mode!r}: must be 'diffusion' or 'ar'")
        if mode == "ar":
            settings = {**settings, **ONE_AT_A_TIME}
        decoding = decoding_from_call(max_new_tokens=max_new_tokens, **settings)
        return next(self.answers([messages], decoding))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the checkpoint: safetensors, config, tokenizer, model card.

        Raises:
            FastDLLMError: when the directory holds something else, or cannot be written.
        """
        save_checkpoint(self.checkpoint, directory)

    def _open(
        self, prompts: Sequence[Prompt], decoding: DecodingConfig | Sequence[DecodingConfig], *, max_batch: int
    ) -> TextStream:
        ids = []
        for number, prompt in enumerate(prompts, start=1):
            with naming(number, len(prompts)):
                ids.append(self._prompt_ids(prompt))
        settings = for_each(ids, decoding)
        if self._text is None and any(one.stop_strings for one in settings):
            raise FastDLLMError("stop_strings need a tokenizer, and this checkpoint has none")
        requests = list(zip(ids, settings, strict=True))
        stops = self.checkpoint.stop_token_ids
        engine, submitted = make_engine(self.backbone, self.config, requests, stops, max_batch=max_batch)
        return TextStream(engine, submitted, self._text)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, Tensor):
            if prompt.dim() != 1:
                raise FastDLLMError(f"a prompt is one row of ids, and this tensor has shape {tuple(prompt.shape)}")
            prompt = prompt.tolist()
        if prompt and all(isinstance(token, int) for token in prompt):
            return [token for token in prompt if isinstance(token, int)]
        if self._text is None:
            raise FastDLLMError("this checkpoint has no tokenizer: pass token ids instead of messages")
        return self._text.prompt_ids(prompt)


def why_not_native(checkpoint: Checkpoint) -> str | None:
    """Why `backbone="auto"` runs a checkpoint through transformers' own modules; None if it does not."""
    return unknown_to_native(checkpoint.model)


def make_backbone(
    checkpoint: Checkpoint,
    name: BackboneName = "auto",
    *,
    int8: bool = False,
    compile: bool = False,
    cache_dtype: CacheDtype | None = None,
) -> Backbone:
    """A backbone for a checkpoint.

    Args:
        checkpoint: loaded, on its device.
        name: as for `BlockDiffusionLM.from_pretrained`.
        int8: quantise the linear layers.
        compile: compile the native backbone's torch path.
        cache_dtype: as for `BlockDiffusionLM.from_pretrained`.

    Raises:
        FastDLLMError: when the native backbone is needed and does not know the model, or cannot be compiled here.
    """
    model, attention = checkpoint.model, checkpoint.config.context_attention
    asked = {"dtype='int8'": int8, "compile=True": compile, f"cache_dtype={cache_dtype!r}": cache_dtype is not None}
    needs = next((option for option, given in asked.items() if given), None)
    if needs is not None and name == "hf":
        raise FastDLLMError(f"{needs} needs the native backbone; leave out backbone='hf'")
    if name == "native" or needs is not None or (name == "auto" and why_not_native(checkpoint) is None):
        precision: Precision = "int8" if int8 else "dense"
        return NativeBackbone(
            model, attention, checkpoint.max_length, precision=precision, compile=compile, cache_dtype=cache_dtype
        )
    return HFBackbone(model, attention, checkpoint.max_length)


def _default_device(*, int8: bool) -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None or int8 else accelerator


def _prompt_rows(input_ids: Any) -> list[list[int]]:
    rows = input_ids.tolist() if isinstance(input_ids, Tensor) else list(input_ids)
    if rows and isinstance(rows[0], int):
        rows = [rows]
    return [row.tolist() if isinstance(row, Tensor) else list(row) for row in rows]


def _as_tensor(rows: list[list[int]], like: Tensor, pad: int) -> Tensor:
    longest = max(len(row) for row in rows)
    padded = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=like.device)
    return padded if like.dim() == 2 else padded[0]
