"""A request as the engine holds it."""

import random
from collections import deque
from dataclasses import dataclass, field

from fast_dllm.config import DecodingConfig
from fast_dllm.decoding.forward import Forward
from fast_dllm.decoding.state import DecodeState

_REMEMBERED = 4  # forwards that had a draft
_SHORTEST_REST, _LONGEST_REST = 4, 32  # forwards without one


@dataclass(eq=False)
class Request:
    """A decode state with what the engine adds to it.

    Attributes:
        id: given by the engine, in order of arrival.
        state: the state machine.
        decoding: what was asked.
        slot: of the cache, while it runs.
        held: positions that count against the token budget, while it runs.
    """

    id: int
    state: DecodeState
    decoding: DecodingConfig
    slot: int | None = None
    held: int = 0
    _draws: list[float] = field(init=False, default_factory=list)
    _kept: deque[int] = field(init=False, default_factory=lambda: deque(maxlen=_REMEMBERED))
    _rest: int = field(init=False, default=0)
    _next_rest: int = field(init=False, default=_SHORTEST_REST)

    def __post_init__(self) -> None:
        self._random = random.Random(self.decoding.seed)
        self._settled = self.state.settled
        self._drafted = False

    def note(self) -> None:
        """Take note of what the forward that was absorbed has settled, and whether it leaves a draft to the next."""
        before, self._settled = self._settled, self.state.settled
        drafted, self._drafted = self._drafted, self.state.block_size > 1
        if self._rest:
            self._rest -= 1
        # The first token of an answer comes with no draft before it.
        if not drafted or not self.state.prompt_length < before < self._settled:
            return
        self._kept.append(self._settled - before)
        if self._kept[-1] > 1:
            self._rest, self._next_rest = 0, _SHORTEST_REST
        elif not self._rest and len(self._kept) == _REMEMBERED and max(self._kept) == 1:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)

    @property
    def promising(self) -> int | None:
        """How many tokens are worth drafting: twice the most that one of the last forwards kept; None before any did.

        What is drafted beyond what will be kept costs its share of a forward for nothing. So where none of the last
        drafts was kept, one token at a time for a while, then another try, and a longer while if that fails too.
        """
        if self._rest:
            return 1
        return 2 * max(self._kept) if self._kept else None

    def draw(self, position: int) -> float:
        """The number from U(0, 1) by which the token at a position of the answer is sampled.

        It hangs on seed and position alone: not on neighbours, and not on how often or in which order positions
        are looked at, so that however an answer is decoded, the same seed means the same sample.
        """
        place = position - self.state.prompt_length
        while place >= len(self._draws):
            self._draws.append(self._random.random())
        return self._draws[place]


@dataclass(frozen=True, slots=True)
class Row:
    """One request in one forward."""

    request: Request
    forward: Forward

    @property
    def slot(self) -> int:
        """Of the cache; a request that runs has one."""
        assert self.request.slot is not None
        return self.request.slot
