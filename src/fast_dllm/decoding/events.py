"""What the decode loop tells the world, and the statistics that follow from it."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]


class ForwardKind(StrEnum):
    """What a forward was for; `COMMIT_BLOCK` commits a block and looks at the next one for the first time."""

    PREFILL = "prefill"
    BLOCK = "block"
    SUB_BLOCK = "sub_block"
    COMMIT = "commit"
    COMMIT_BLOCK = "commit_block"


@dataclass(frozen=True, slots=True)
class Event:
    """One forward of one request.

    Attributes:
        request: the request's id.
        kind: what the forward was for.
        query_tokens: positions it ran over.
        step: number of the forward within the request, from 0.
        positions: absolute positions revealed by it; prompts count from 0. What lies behind a stop token or the
            length limit is revealed with its sub-block, but is no part of the answer.
        tokens: the ids revealed.
        confidences: the model's confidence in each.
        settled: absolute position up to which every token is now final; what lies before it may be shown as text.
        withdrawn: drafted tokens that it took back, when a draft is verified: the one at `positions[0]`, for which it
            reveals another, and all behind it.
        prefilled: prompt positions that it committed, in whatever kind of forward; in a request that was preempted,
            answer positions that it commits once more too.
        finish: why the request ended, with its last event.
    """

    request: int
    kind: ForwardKind
    query_tokens: int
    step: int
    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    confidences: tuple[float, ...]
    settled: int
    withdrawn: int = 0
    prefilled: int = 0
    finish: FinishReason | None = None


@dataclass
class Statistics:
    """Counts of one request, or of several added up.

    Attributes:
        forwards_by_kind: forwards that the request took part in.
        query_tokens_by_kind: positions that they ran over.
        revealed_tokens: tokens revealed, those behind the stop token included.
        withdrawn_tokens: of these, drafts that verification took back.
        new_tokens: tokens of the answer: no masks, no padding, nothing behind the stop token, or the token that
            completed a stop string (which count).
        reused_tokens: positions whose K/V a prefill did not have to compute, the cache holding them already. When a
            preempted request comes back they count again, as the positions of its prefill do.
    """

    forwards_by_kind: Counter[str] = field(default_factory=Counter)
    query_tokens_by_kind: Counter[str] = field(default_factory=Counter)
    revealed_tokens: int = 0
    withdrawn_tokens: int = 0
    new_tokens: int = 0
    reused_tokens: int = 0

    @property
    def forwards(self) -> int:
        """All forwards, prefill and commits included."""
        return self.forwards_by_kind.total()

    @property
    def tokens_per_forward(self) -> float:
        """New tokens for each forward of any kind; autoregressive decoding has exactly 1."""
        return self.new_tokens / self.forwards if self.forwards else 0.0

    def count(self, event: Event) -> None:
        """Add one forward."""
        self.forwards_by_kind[event.kind.value] += 1
        self.query_tokens_by_kind[event.kind.value] += event.query_tokens
        self.revealed_tokens += len(event.tokens)
        self.withdrawn_tokens += event.withdrawn

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.forwards_by_kind + other.forwards_by_kind,
            self.query_tokens_by_kind + other.query_tokens_by_kind,
            self.revealed_tokens + other.revealed_tokens,
            self.withdrawn_tokens + other.withdrawn_tokens,
            self.new_tokens + other.new_tokens,
            self.reused_tokens + other.reused_tokens,
        )
