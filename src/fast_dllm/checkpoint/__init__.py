"""Checkpoints: loaded from wherever a model may be, given a mask token, saved."""

from fast_dllm.checkpoint.adapter import is_gated
from fast_dllm.checkpoint.checkpoint import AUTOREGRESSIVE, Checkpoint
from fast_dllm.checkpoint.gguf import smollm2_gguf
from fast_dllm.checkpoint.load import load_adapter_base, load_checkpoint, load_tokenizer_of
from fast_dllm.checkpoint.mask_token import add_mask_token, find_mask_token
from fast_dllm.checkpoint.save import complete_save, save_adapter, save_checkpoint

__all__ = [
    "AUTOREGRESSIVE",
    "Checkpoint",
    "add_mask_token",
    "complete_save",
    "find_mask_token",
    "is_gated",
    "load_adapter_base",
    "load_checkpoint",
    "load_tokenizer_of",
    "save_adapter",
    "save_checkpoint",
    "smollm2_gguf",
]
