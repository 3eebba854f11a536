"""Corruption: which response tokens each noisy view hides. Pure functions of (loss mask, generator)."""

import torch
from torch import Tensor

EPSILON = 1e-3
"""Least probability of masking a token (arXiv 2509.26328's code: p = (1 - eps) t + eps)."""


def draw_views(
    loss_mask: Tensor,
    block_size: int,
    generator: torch.Generator | None = None,
    *,
    complementary: bool = True,
    mask_ratio: float | None = None,
) -> Tensor:
    """Draw the noisy views of a batch.

    Each block draws t ~ U(0, 1); each of its loss positions is hidden in view 1 with probability
    p = (1 - eps) t + eps, and, with complementary masks, in view 2 exactly where view 1 shows it. So both views
    together predict every response token once.

    Args:
        loss_mask: bool [..., L], the response tokens; L must be a multiple of `block_size`.
        block_size: D.
        generator: a CPU generator; None takes torch's global one.
        complementary: draw view 2 too.
        mask_ratio: p of every block, instead of one drawn for each; at 1 view 1 hides every answer, as a draft's first
            look does, and view 2 none.

    Returns:
        bool [V, ..., L], true where the view hides the token; V is 2, or 1 if not `complementary`.
    """
    blocks = loss_mask.numel() // block_size
    # The order of the two draws is the published code's: recorded losses are reproduced from the seed alone.
    t = torch.rand(blocks, generator=generator)
    u = torch.rand(blocks, block_size, generator=generator)
    p = (1 - EPSILON) * t + EPSILON if mask_ratio is None else torch.full_like(t, mask_ratio)
    hidden = (u < p[:, None]).view(loss_mask.shape).to(loss_mask.device)
    views = [hidden & loss_mask, ~hidden & loss_mask] if complementary else [hidden & loss_mask]
    return torch.stack(views)
