"""A request as the engine holds it."""

from dataclasses import dataclass, field

import torch

from fast_dllm.config import DecodingConfig
from fast_dllm.decoding.state import DecodeState, Forward


@dataclass(eq=False)
class Request:
    """A decode state with what the engine adds to it.

    Attributes:
        id: given by the engine, in order of arrival.
        state: the state machine.
        decoding: what was asked.
        generator: this request's own, so that its draws do not depend on its neighbours.
        slot: of the cache, while it runs.
        held: positions that count against the token budget, while it runs.
    """

    id: int
    state: DecodeState
    decoding: DecodingConfig
    generator: torch.Generator = field(init=False)
    slot: int | None = None
    held: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.decoding.seed)


@dataclass(frozen=True, slots=True)
class Row:
    """One request in one forward."""

    request: Request
    forward: Forward
