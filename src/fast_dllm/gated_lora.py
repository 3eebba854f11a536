"""Gated LoRA: an adapter that acts at mask tokens alone (arXiv 2507.11851).

Every other token is computed by the weights beneath, so with causal context attention the autoregressive answers stay
what they were, bit for bit, and the adapter learns nothing but to draft.

Shape legend: B rows, Q positions, R rank, I and O inputs and outputs of a linear layer.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fast_dllm.errors import FastDLLMError

_GATE = "_fast_dllm_gate"


class LowRank(NamedTuple):
    """What a gated adapter adds to a linear layer at the positions where it acts: up @ (down @ x).

    Attributes:
        down: [R, I].
        up: [O, R], the adapter's scale in it.
    """

    down: Tensor
    up: Tensor


class _Gate:
    """Which positions of the forward under way hold the mask token: bool [B, Q]."""

    def __init__(self, token_id: int) -> None:
        self.token_id = token_id
        self.open: Tensor | None = None

    def look(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Before the embedding."""
        self.open = inputs[0] == self.token_id

    def close(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Behind the first of an adapter's two matrices."""
        if self.open is None or self.open.shape != output.shape[:-1]:
            raise FastDLLMError(
                f"gated LoRA: a layer sees {tuple(output.shape[:-1])} tokens in another shape than the embedding did "
                "(a mixture of experts?); train a plain adapter"
            )
        return output * self.open[..., None]


def gate_adapter(model: Any, token_id: int) -> None:
    """Let the LoRA layers of a model act at one token only, in every forward through its own modules.

    Args:
        model: a transformers `...ForCausalLM` whose linear layers peft has wrapped.
        token_id: the mask token.
    """
    gate = _Gate(token_id)
    setattr(model, _GATE, gate)
    model.get_input_embeddings().register_forward_pre_hook(gate.look)
    for module in model.modules():
        for down in getattr(module, "lora_A", {}).values():
            down.register_forward_hook(gate.close)


def is_of_adapter(name: str) -> bool:
    """Whether a module or parameter of a model belongs to its LoRA adapter, by its name."""
    return "lora_" in name


def gated_token(model: Any) -> int | None:
    """The token at which a model's adapter acts; None where no gated adapter is on it."""
    gate: _Gate | None = getattr(model, _GATE, None)
    return None if gate is None else gate.token_id


@torch.no_grad()
def low_rank_of(linear: Any) -> LowRank | None:
    """What the adapter on a linear layer adds; None where there is none."""
    if not hasattr(linear, "lora_A"):
        return None
    (name,) = linear.active_adapters
    return LowRank(linear.lora_A[name].weight.detach(), linear.lora_B[name].weight.detach() * linear.scaling[name])
