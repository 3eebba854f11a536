"""The ways to decode that are compared."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import ONE_AT_A_TIME, DecodingConfig

_VERIFIED: Mapping[str, Any] = {"verify": True}
# Add a way to decode a block here, and every table of block diffusion has it. The first one is the default of
# `DecodingConfig` where a model cannot verify.
_UNVERIFIED: tuple[Mapping[str, Any], ...] = (
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
            return dict(ONE_AT_A_TIME)
        return {"threshold": self.threshold, **dict(self.chosen)}

    def labels(self) -> dict[str, Any]:
        """What a record says of it besides the threshold; without a cache nothing is refreshed."""
        if self.threshold is None:
            return {}
        plain = {"verify": False, "sub_block_cache": "none", "cache_refresh": None, "fused_commit": False}
        return {**plain, **dict(self.chosen)}

    def is_of(self, record: Mapping[str, Any]) -> bool:
        """Whether a record is of this way to decode."""
        return record["threshold"] == self.threshold and self.labels().items() <= record.items()

    def __str__(self) -> str:
        if self.threshold is None:
            return "AR"
        words = {
            ("sub_block_cache", "none"): None,
            ("fused_commit", True): "fused commit",
            ("verify", True): "verified",
            ("verify", False): None,
        }
        chosen = [word for key, value in self.chosen if (word := words.get((key, value), str(value)))]
        return ", ".join([f"diffusion {self.threshold:g}", *chosen])


AR = Setting(None)


def diffusion(lm: BlockDiffusionLM, threshold: float | None = None, way: Mapping[str, Any] | None = None) -> Setting:
    """Block diffusion.

    Args:
        lm: the model.
        threshold: None takes the default of this way.
        way: fields of `DecodingConfig`; None takes the model's default way.
    """
    way = block_settings(lm)[0] if way is None else way
    return Setting(DecodingConfig(threshold=threshold, **way).threshold_on(lm.config), tuple(sorted(way.items())))


def block_settings(lm: BlockDiffusionLM) -> list[Mapping[str, Any]]:
    """Every way to decode a block that a model knows; the first one is its default."""
    verified = [_VERIFIED] if DecodingConfig().verifies(lm.config) else []
    return [*verified, *({"verify": False, **way} for way in _UNVERIFIED)]


def can_diffuse(lm: BlockDiffusionLM) -> bool:
    """Whether the checkpoint was adapted to decode in blocks."""
    return lm.config.mask_token_id is not None and (lm.config.block_size > 1 or lm.config.context_attention == "full")


def can_go_one_by_one(lm: BlockDiffusionLM) -> bool:
    """Whether the checkpoint can decode autoregressively: its one block must not be the canvas."""
    return lm.config.context_attention != "full"


def settings_for(lm: BlockDiffusionLM, thresholds: Sequence[float], *, every_way: bool) -> list[Setting]:
    """Ways to decode that a model knows: AR, then block diffusion at each threshold, in each way or its default."""
    ways = [AR] if can_go_one_by_one(lm) else []
    if can_diffuse(lm):
        chosen = block_settings(lm)[: None if every_way else 1]
        each: Sequence[float | None] = thresholds or [None]
        ways += [diffusion(lm, threshold, way) for threshold in each for way in chosen]
    return ways


def usual_settings(lm: BlockDiffusionLM, thresholds: Sequence[float]) -> list[Setting]:
    """AR, and the default block diffusion at one threshold: the default if it is chosen or none is, else the last."""
    default = diffusion(lm).threshold
    return settings_for(lm, [] if default in thresholds else thresholds[-1:], every_way=False)


def usual_ways(
    models: Mapping[str, BlockDiffusionLM], thresholds: Sequence[float]
) -> Iterator[tuple[str, BlockDiffusionLM, Setting]]:
    """(dtype, model, setting) of the usual settings of every model."""
    for dtype, lm in models.items():
        for setting in usual_settings(lm, thresholds):
            yield dtype, lm, setting
