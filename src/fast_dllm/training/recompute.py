"""Memory for arithmetic: which activations are kept, and which are computed again in the backward."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from fast_dllm.training.pieces import OPERATOR

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.addmm.default}
"""Of a linear layer: its weight, transposed, is the last argument."""

_KEPT = _PRODUCTS | {
    _ATEN.bmm.default,
    OPERATOR,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
}


def recompute_layers(model: PreTrainedModel) -> None:
    """Keep each layer's input alone: least memory, a second forward."""
    _enable(model, {"use_reentrant": False})


def recompute_cheap_operations(model: PreTrainedModel) -> None:
    """Keep what attention comes to, and products that are as wide as their input, or wider; all else is done again.

    In most families that leaves out keys and values, which fewer heads share, and an MLP's last product: it is about
    half of what autograd would keep, for a few percent of a step's products. Compiled flex_attention shows nothing of
    itself: it is done again. Not for adapters: each of their layers has two products more, whose results autograd
    itself does not need.
    """
    if model.supports_gradient_checkpointing:
        contexts = partial(create_selective_checkpoint_contexts, _policy)
        _enable(model, {"use_reentrant": False, "context_fn": contexts})


def recomputes(model: PreTrainedModel) -> bool:
    """Whether one of the two is on."""
    # Its name in transformers before 5.23 is deprecated there.
    old = "is_gradient_checkpointing"
    return bool(getattr(model, "is_activation_checkpointing" if hasattr(model, "is_activation_checkpointing") else old))


def is_kept(operation: Any, arguments: Sequence[Any]) -> bool:
    """Whether `recompute_cheap_operations` keeps what an operation comes to.

    Of products those that are not narrower than their input. Narrower ones are keys and values of few heads (and where
    heads are wide, what attention comes to in the stream), which are computed again, and an MLP's last one, which is
    not: what it is added to is the next layer's input, which is kept, and torch stops computing again once all is there
    that the backward reads. (Where a norm follows, as in Gemma 2, it is computed again.)

    Args:
        operation: of ATen.
        arguments: of the call.
    """
    if operation not in _KEPT:
        return False
    if operation not in _PRODUCTS:
        return True
    inputs, outputs = arguments[-1].shape
    return bool(inputs <= outputs)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(operation, args) else CheckpointPolicy.PREFER_RECOMPUTE


def _enable(model: PreTrainedModel, settings: dict[str, Any]) -> None:
    # Its name in transformers before 5.23 is deprecated there.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)
