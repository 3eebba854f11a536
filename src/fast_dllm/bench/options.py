"""What to measure: the options of a run, and the sizes they come to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fast_dllm.config import CacheDtype
from fast_dllm.data.tasks import RESERVED_TEST_ITEMS
from fast_dllm.errors import FastDLLMError

TABLES = ("throughput", "latency", "first_token", "peers", "growth", "precision", "linears")
DTYPES = ("float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes of every table.

    Attributes:
        dtypes: of the weights.
        items: questions asked.
        batches: prompts decoded at once.
        every_way_up_to: largest batch at which every way to decode in blocks is measured; only the first one above.
        thresholds: of block diffusion; none is the default of each way to decode.
        rounds: least number of repetitions of a batch size; enough to ask all items otherwise.
        positions: tokens of a measured forward.
        contexts: tokens in the cache before it.
        forward_rounds: repetitions of each forward.
        prompt_lengths: tokens of the prompts whose first token is awaited.
        first_token_rounds: repetitions of each of them.
        peer_items: questions that the peers answer too.
        growth_contexts: prompt lengths at which decoding is measured.
        growth_batches: batch sizes, each at the shortest of these prompts.
        growth_tokens: new tokens there.
        growth_rounds: repetitions there.
    """

    dtypes: tuple[str, ...]
    items: int
    batches: tuple[int, ...]
    every_way_up_to: int
    thresholds: tuple[float, ...]
    rounds: int
    positions: tuple[int, ...]
    contexts: tuple[int, ...]
    forward_rounds: int
    prompt_lengths: tuple[int, ...]
    first_token_rounds: int
    peer_items: int
    growth_contexts: tuple[int, ...]
    growth_batches: tuple[int, ...]
    growth_tokens: int
    growth_rounds: int


SMALL = Plan(
    dtypes=("bfloat16", "int8"),
    items=8,
    batches=(1, 16),
    every_way_up_to=1,
    thresholds=(),
    rounds=2,
    positions=(1, 8, 32),
    contexts=(512,),
    forward_rounds=15,
    prompt_lengths=(128, 512),
    first_token_rounds=3,
    peer_items=6,
    growth_contexts=(128, 512),
    growth_batches=(1, 4),
    growth_tokens=32,
    growth_rounds=2,
)
FULL = Plan(
    dtypes=("float32", "bfloat16", "int8"),
    items=32,
    batches=(1, 4, 16, 32),
    every_way_up_to=32,
    thresholds=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    rounds=3,
    positions=(1, 8, 16, 32, 64),
    contexts=(128, 1024, 4096, 8192),
    forward_rounds=30,
    prompt_lengths=(128, 512, 2048),
    first_token_rounds=7,
    peer_items=32,
    growth_contexts=(512, 2048, 8192),
    growth_batches=(1, 4, 16),
    growth_tokens=64,
    growth_rounds=3,
)


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What a run measures. None, or nothing, takes the preset's.

    Attributes:
        model: as for `BlockDiffusionLM.from_pretrained`.
        base: as there.
        full: the full preset instead of the small one.
        tables: names in `TABLES`.
        out: directory of bench.json and the figures.
        usual_way: of block diffusion, measure only the model's default way, not every cache and refresh rule.
        resume: keep what `out`/bench.json has of a run like this one, and measure the rest.
        dtypes: names in `DTYPES`.
        cache_dtype: of K/V, "bfloat16" or "int8"; None takes each model's own.
        threads: CPU threads of every contestant; None takes torch's number.
        items: questions to ask, from 1 to 199.
        batches: prompts decoded at once.
        thresholds: of block diffusion, from 0 to 1.
        seed: chooses the questions among the reserved ones.
        max_new_tokens: limit of an answer.
    """

    model: str = "smollm2"
    base: str | None = None
    full: bool = False
    tables: Sequence[str] = TABLES
    out: Path = Path("runs/bench")
    usual_way: bool = False
    resume: bool = False
    dtypes: Sequence[str] = ()
    cache_dtype: CacheDtype | None = None
    threads: int | None = None
    items: int | None = None
    batches: Sequence[int] = ()
    thresholds: Sequence[float] = ()
    seed: int = 0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        _check_names("table", self.tables, TABLES)
        _check_names("dtype", self.dtypes, DTYPES)
        _require(bool(self.tables), f"no tables chosen; choose from {', '.join(TABLES)}")
        _require(self.threads is None or self.threads >= 1, f"threads={self.threads}: must be 1 or more")
        most = RESERVED_TEST_ITEMS - 1
        _require(self.items is None or 1 <= self.items <= most, f"items={self.items}: must be from 1 to {most}")
        for batch in self.batches:
            _require(batch >= 1, f"batch={batch}: must be 1 or more")
        for threshold in self.thresholds:
            _require(0 <= threshold <= 1, f"threshold={threshold:g}: must be a number from 0 to 1")
        _require(self.seed >= 0, f"seed={self.seed}: must be 0 or more")
        _require(self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens}: must be 1 or more")

    def plan(self) -> Plan:
        """The preset, with what was chosen in place of its own."""
        preset = FULL if self.full else SMALL
        items = preset.items if self.items is None else self.items
        return replace(
            preset,
            dtypes=_distinct(self.dtypes) or preset.dtypes,
            items=items,
            peer_items=min(preset.peer_items, items) if self.items is None else items,
            batches=_distinct(self.batches) or preset.batches,
            every_way_up_to=0 if self.usual_way else max(self.batches, default=preset.every_way_up_to),
            thresholds=_distinct(self.thresholds) or preset.thresholds,
        )

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON holds them."""
        return {**asdict(self), "out": str(self.out)}


def _distinct(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _check_names(kind: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        _require(name in known, f"{kind} {name!r}: unknown; choose from {', '.join(known)}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise FastDLLMError(message)
