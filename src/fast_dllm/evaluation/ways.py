"""The ways to decode that an evaluation compares."""

from collections.abc import Sequence

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import DecodingConfig

AUTOREGRESSIVE = "AR"


def ways_to_decode(lm: BlockDiffusionLM, thresholds: Sequence[float]) -> dict[str, DecodingConfig]:
    """AR, and block diffusion at each threshold: drafted and verified where the model allows it, and not verified.

    Args:
        lm: the model.
        thresholds: of block diffusion.

    Returns:
        Settings by name.
    """
    ways = {AUTOREGRESSIVE: DecodingConfig(block_size=1, small_block_size=1)}
    if lm.config.block_size == 1:  # not adapted
        return ways
    verifies = DecodingConfig().verifies(lm.config)
    for verify in (True, False) if verifies else (False,):
        for threshold in thresholds:
            name = f"{'verified' if verify else 'diffusion'} {threshold:g}"
            ways[name] = DecodingConfig(threshold=threshold, verify=verify)
    return ways
