"""Who runs, and with whom: queues, budgets and rows, no tensors."""

import math
from collections import deque

from fast_dllm.decoding.state import next_forward, restartable
from fast_dllm.engine.request import Request, Row

_MOST_PREFILLED = 4096
"""Positions of a tick behind which no further prompt is begun: what a forward needs of memory grows with them."""


class Scheduler:
    """Waiting and running requests; first come first served, in everything.

    A tick is `begin`, then `admit` and `plan` for each newcomer, then `rows`.

    Attributes:
        waiting: in order of arrival; all of them came after those that run.
        running: in order of arrival.
    """

    def __init__(self, token_budget: int | None, prefill_chunk: int | None, draft_budget: int | None = None) -> None:
        """Start with no requests.

        Args:
            token_budget: positions that the running requests may hold together; None for no limit.
            prefill_chunk: most positions of a prefill forward, and of all of them in a tick; None runs every prompt
                whole, one at least in a tick, and several up to `_MOST_PREFILLED` positions.
            draft_budget: masks that the rows which verify their drafts share in a tick; None for no limit, and no
                thought of what a draft is worth.
        """
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._token_budget = math.inf if token_budget is None else token_budget
        self._prefill_chunk = prefill_chunk
        self._draft_budget = draft_budget
        self._held = 0
        self._begin_tick()

    def _begin_tick(self) -> None:
        self._rows: list[Row] = []
        self._prefill_room = _MOST_PREFILLED if self._prefill_chunk is None else self._prefill_chunk
        self._prefilling = False
        self._stalled = False

    def begin(self) -> list[Request]:
        """Start a tick: plan the forwards of the running requests, the oldest first.

        A request whose next block does not fit takes the place of the youngest. Where that one cannot be restarted
        now, it goes without a forward until it can: at the latest when its block is done.

        Returns:
            Requests that were preempted; they are at the head of the queue, and still have their slots.
        """
        self._begin_tick()
        preempted: list[Request] = []
        number = 0
        while number < len(self.running):  # preemption shortens it from the end
            request = self.running[number]
            self._share_drafts(request, len(self.running))
            if self._grow(request, preempted):
                self.plan(request)
            number += 1
        return preempted

    def admit(self, free_slots: int) -> Request | None:
        """Let the next waiting request run, if there is a slot, and room for all of its prompt and its first block.

        Args:
            free_slots: how many there are.

        Returns:
            The request, to be given a slot; None when there is none to admit.
        """
        if not self.waiting or not free_slots or self._stalled or self._prefill_room <= 0:
            return None
        self._share_drafts(self.waiting[0], len(self.running) + 1)
        needed = self.waiting[0].state.block_end
        if self._held + needed > self._token_budget:
            return None
        request = self.waiting.popleft()
        self._hold(request, needed)
        self.running.append(request)
        return request

    def plan(self, request: Request) -> None:
        """Plan a request's forward; a prefill only while there is room in this tick, though one always runs.

        Args:
            request: running; a newcomer has its slot by now.
        """
        forward = next_forward(request.state, self._prefill_chunk)
        assert forward is not None, "a request that has ended is retired at once"
        if forward.prefilled:
            if self._prefilling and forward.prefilled > self._prefill_room:
                self._prefill_room = 0
                return
            self._prefilling = True
            self._prefill_room -= forward.prefilled
        self._rows.append(Row(request, forward))

    def rows(self) -> list[Row]:
        """What runs in this tick, in order of (query length, slot).

        What a row runs over and may look at is its own, so prefills, denoising rows and commits share one forward.
        """
        return sorted(self._rows, key=lambda row: (row.forward.end - row.forward.start, row.slot))

    def retire(self, request: Request) -> None:
        """Forget a request that has ended."""
        if request in self.waiting:
            self.waiting.remove(request)
        else:
            self.running.remove(request)
            self._hold(request, 0)

    def _share_drafts(self, request: Request, rows: int) -> None:
        """Let a request draft what is promising, of its share of the budget: at least the one token of AR decoding."""
        if self._draft_budget is not None:
            share = max(self._draft_budget // rows, 1)
            request.state.draft(share if request.promising is None else min(share, request.promising))

    def _hold(self, request: Request, positions: int) -> None:
        self._held += positions - request.held
        request.held = positions

    def _grow(self, request: Request, preempted: list[Request]) -> bool:
        """Let a request hold its current block too; whether it may."""
        growth = request.state.block_end - request.held
        if growth <= 0:  # a verified block may begin before the one that was refused
            self._hold(request, request.state.block_end)
            return True
        if self._stalled:  # what becomes free is for the older one that waits
            return False
        while self._held + growth > self._token_budget:
            youngest = self.running[-1]
            if youngest is request or not restartable(youngest.state):
                self._stalled = True
                return False
            self.running.pop()
            self._hold(youngest, 0)
            self.waiting.appendleft(youngest)
            preempted.append(youngest)
        self._hold(request, request.state.block_end)
        return True
