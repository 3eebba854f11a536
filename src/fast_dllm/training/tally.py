"""Token losses by what the tokens were predicted from: a mean alone does not show what a model cannot do yet."""

import torch
from torch import Tensor

_PARTS = 4
_NAMES = (
    *(f"loss_hidden_{100 * (part + 1) // _PARTS}" for part in range(_PARTS)),
    *(f"loss_place_{part + 1}" for part in range(_PARTS)),
    "loss_ar",
)
_AR = len(_NAMES) - 1


class Tally:
    """Sums since the last log line, on the model's device.

    `loss_hidden_25` ... `loss_hidden_100` are means over tokens of blocks with up to a quarter ... all of their answer
    hidden; `loss_place_1` ... `loss_place_4` over the quarters of a block, from its first positions to its last.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._sums = torch.zeros(len(_NAMES) + 1, 2, dtype=torch.float64)

    def add(self, losses: Tensor, is_ar: Tensor, hidden_share: Tensor, place: Tensor, tokens: Tensor) -> None:
        """Add a forward.

        Args:
            losses: [N].
            is_ar: bool [N].
            hidden_share: float [N], of the answer in the target's block; any value where `is_ar`.
            place: int64 [N], of the target in its block.
            tokens: int64 [1], response tokens of the forward.
        """
        # Apple's GPUs have no float64.
        precise = torch.float32 if losses.device.type == "mps" else torch.float64
        sums = self._sums = self._sums.to(precise).to(losses.device)
        losses = losses.detach().to(precise)
        values = torch.stack([losses, torch.ones_like(losses)], dim=1)
        share = (hidden_share * _PARTS).ceil().long().clamp(1, _PARTS) - 1
        sums.index_add_(0, torch.where(is_ar, _AR, share), values)
        # Zeros for the others: to leave them out, the host would have to wait for how many there are.
        sums.index_add_(0, _PARTS + place * _PARTS // self._block_size, values.masked_fill(is_ar[:, None], 0.0))
        sums[-1, 0] += tokens[0]

    def take(self) -> Tensor:
        """The sums, which begin anew: to be added up over processes, and given to `read`."""
        taken, self._sums = self._sums, torch.zeros_like(self._sums)
        return taken


def read(sums: Tensor) -> tuple[dict[str, float], int]:
    """What sums say.

    Returns:
        Means in nats, of what occurred; and the response tokens.
    """
    *rows, (tokens, _) = sums.tolist()
    means = {name: round(total / count, 4) for name, (total, count) in zip(_NAMES, rows, strict=True) if count}
    return means, int(tokens)
