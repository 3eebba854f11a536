"""The ways to decode that are compared."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fast_dllm.api import BlockDiffusionLM

# Add a way to decode a block here, and every table of block diffusion has it. The first one is the default of
# `DecodingConfig`, and the only one where there is no time for all.
BLOCK_SETTINGS: tuple[Mapping[str, Any], ...] = (
    {"sub_block_cache": "dual", "cache_refresh": "block"},
    {"sub_block_cache": "dual", "cache_refresh": "block", "fused_commit": True},
    {"sub_block_cache": "dual", "cache_refresh": "sub-block"},
    {"sub_block_cache": "dual", "cache_refresh": "published"},
    {"sub_block_cache": "none"},
    {"sub_block_cache": "none", "fused_commit": True},
)


@dataclass(frozen=True)
class Setting:
    """One way to decode.

    Attributes:
        threshold: of block diffusion; None is one token at a time (AR).
        chosen: further fields of `DecodingConfig`, as sorted pairs.
    """

    threshold: float | None
    chosen: tuple[tuple[str, Any], ...] = ()

    @property
    def is_ar(self) -> bool:
        """Whether it decodes one token at a time."""
        return self.threshold is None

    def decoding(self) -> dict[str, Any]:
        """Its fields of `DecodingConfig`."""
        if self.threshold is None:
            return {"block_size": 1, "small_block_size": 1}
        return {"threshold": self.threshold, **dict(self.chosen)}

    def labels(self) -> dict[str, Any]:
        """What a record says of it besides the threshold; without a cache nothing is refreshed."""
        if self.threshold is None:
            return {}
        return {"sub_block_cache": "none", "cache_refresh": None, "fused_commit": False, **dict(self.chosen)}

    def __str__(self) -> str:
        if self.threshold is None:
            return "AR"
        words = {("sub_block_cache", "none"): None, ("fused_commit", True): "fused commit"}
        chosen = [word for key, value in self.chosen if (word := words.get((key, value), str(value)))]
        return ", ".join([f"diffusion {self.threshold:g}", *chosen])


AR = Setting(None)


def diffusion(threshold: float, chosen: Mapping[str, Any] = BLOCK_SETTINGS[0]) -> Setting:
    """Block diffusion at a threshold."""
    return Setting(threshold, tuple(sorted(chosen.items())))


def can_diffuse(lm: BlockDiffusionLM) -> bool:
    """Whether the checkpoint was adapted to decode in blocks."""
    return lm.config.mask_token_id is not None and (lm.config.block_size > 1 or lm.config.context_attention == "full")


def can_go_one_by_one(lm: BlockDiffusionLM) -> bool:
    """Whether the checkpoint can decode autoregressively: its one block must not be the canvas."""
    return lm.config.context_attention != "full"


def settings_for(
    lm: BlockDiffusionLM, thresholds: Iterable[float], block_settings: Sequence[Mapping[str, Any]] = BLOCK_SETTINGS
) -> list[Setting]:
    """Every way to decode that a model knows: AR, then block diffusion at each threshold in each way."""
    ways = [AR] if can_go_one_by_one(lm) else []
    if can_diffuse(lm):
        ways += [diffusion(threshold, chosen) for threshold in thresholds for chosen in block_settings]
    return ways


def usual_ways(
    models: Mapping[str, BlockDiffusionLM], threshold: float
) -> Iterator[tuple[str, BlockDiffusionLM, Setting]]:
    """(dtype, model, setting) of AR and of the default block diffusion, for every model."""
    for dtype, lm in models.items():
        for setting in settings_for(lm, [threshold], BLOCK_SETTINGS[:1]):
            yield dtype, lm, setting
