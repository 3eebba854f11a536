"""The mask token's row of the embedding, trained without a gradient of all the others.

peft writes the trained rows into a copy of the whole matrix, in every forward and for the embedding and the head each,
and so the backward makes a gradient of that size, of which all rows but these are thrown away.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch import Tensor, nn


class _TrainedRows(TrainableTokensLayer):  # type: ignore[misc]
    """Runs the frozen matrix as it is and replaces what the trained rows give."""

    def forward_adapters(self, x: Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        if self.disable_adapters or self.merged or not isinstance(base, nn.Embedding | nn.Linear):
            result: Tensor = super().forward_adapters(x, active_adapters, *args, **kwargs)
            return result
        self._check_overlapping_tokens(active_adapters)
        out: Tensor = base(x)
        for name in active_adapters:
            ids, rows = self.token_indices[name], self.trainable_tokens_delta[name]
            if isinstance(base, nn.Linear):  # the head, tied to the embedding
                out[..., ids] = F.linear(x, rows.to(x.dtype)).to(out.dtype)
                continue
            scale = self._get_embed_scale()
            rows = (rows if scale is None else rows * scale).to(out.dtype)
            for token_id, row in zip(ids, rows.unbind(), strict=True):
                out = torch.where((x == token_id)[..., None], row, out)
        return out


def train_rows_alone(model: nn.Module) -> None:
    """Let a peft model compute its trained token rows, and their gradients, alone.

    Args:
        model: with peft's `trainable_token_indices`; one without stays as it is.
    """
    for module in model.modules():
        if type(module) is TrainableTokensLayer:
            module.__class__ = _TrainedRows
