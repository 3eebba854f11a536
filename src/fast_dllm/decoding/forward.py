"""What a request asks of the model, and what it gets."""

from dataclasses import dataclass

from fast_dllm.decoding.events import ForwardKind

Revealed = tuple[int, int, float]
"""(position, token, confidence) of a token that a row reveals."""


@dataclass(frozen=True, slots=True)
class Forward:
    """A forward that a request needs.

    Attributes:
        kind: what it is for.
        start: first position it runs over.
        end: end of the positions it runs over.
        visible_end: end of the keys it may look at.
        noisy_from: start of the noisy block; `visible_end` in a clean forward.
        candidates: positions whose token it predicts.
        certain: so many of the first candidates the policy does not weigh against the others: they are revealed in
            any case.
        prefilled: so many of the first positions are run for their K/V alone.
    """

    kind: ForwardKind
    start: int
    end: int
    visible_end: int
    noisy_from: int
    candidates: tuple[int, ...]
    certain: int = 0
    prefilled: int = 0

    @property
    def decisions(self) -> list[int]:
        """How many candidates each decision of the policy is about, in their order."""
        weighed = len(self.candidates) - self.certain
        return [1] * self.certain + ([weighed] if weighed else [])
