"""Who runs, and with whom: queues and rows, no tensors."""

from collections import deque
from collections.abc import Iterable

from fast_dllm.decoding.state import next_forward
from fast_dllm.engine.request import Request, Row


class Scheduler:
    """Waiting and running requests."""

    def __init__(self) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def admit(self, free_slots: int) -> list[Request]:
        """Move waiting requests to the free slots, first come first served."""
        admitted = [self.waiting.popleft() for _ in range(min(free_slots, len(self.waiting)))]
        self.running += admitted
        return admitted

    def retire(self, request: Request) -> None:
        """Forget a request that has ended."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)


def rows_of(requests: Iterable[Request]) -> list[Row]:
    """What each request needs now, all of it one forward.

    What a row runs over and may look at is its own, so a prefill, a denoising row and a committing one share it.

    Args:
        requests: running ones, each with a slot.

    Returns:
        In order of (query length, slot).
    """
    rows = []
    for request in requests:
        forward = next_forward(request.state)
        if forward is not None:
            rows.append(Row(request, forward))
    return sorted(rows, key=lambda row: (row.forward.end - row.forward.start, row.request.slot or 0))
