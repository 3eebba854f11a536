"""The ways to decode that an evaluation compares."""

from collections.abc import Sequence

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import ONE_AT_A_TIME, DecodingConfig

AR = "AR"
"""The name of one token at a time."""


def ways_to_decode(
    lm: BlockDiffusionLM, thresholds: Sequence[float], *, verify: bool | None = None
) -> dict[str, DecodingConfig]:
    """AR, and block diffusion at each threshold: drafted and verified where the model allows it, and not verified.

    A full-attention model has no AR.

    Args:
        lm: the model.
        thresholds: of block diffusion.
        verify: True leaves out what is not verified, False what is; None leaves out nothing.

    Returns:
        Settings by name.

    Raises:
        FastDLLMError: for True, where the model cannot verify.
    """
    ways = {} if lm.config.context_attention == "full" else {AR: DecodingConfig(**ONE_AT_A_TIME)}
    if lm.config.block_size == 1:  # not adapted
        return ways
    verifies = DecodingConfig(verify=verify).verifies(lm.config)
    for verified in (True, False) if verifies and verify is None else (verifies,):
        for threshold in thresholds:
            name = f"{'verified' if verified else 'diffusion'} {threshold:g}"
            ways[name] = DecodingConfig(threshold=threshold, verify=verified)
    return ways
