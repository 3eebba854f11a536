"""Who runs, and with whom: queues and groups, no tensors."""

from collections import defaultdict, deque
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


def group(requests: Iterable[Request]) -> list[list[Row]]:
    """Rows that can share a forward: those of equal query length.

    What a row may look at is per row, so a denoising row and a committing row of one length share a forward too.

    Args:
        requests: running ones, each with a slot.

    Returns:
        Groups, rows in order of their slots.
    """
    groups: dict[int, list[Row]] = defaultdict(list)
    for request in requests:
        forward = next_forward(request.state)
        if forward is not None:
            groups[forward.end - forward.start].append(Row(request, forward))
    return [sorted(rows, key=lambda row: row.request.slot or 0) for rows in groups.values()]
