"""The decode loop. There is no other."""

from collections.abc import Iterator, Sequence

from fast_dllm.cache import KVCache
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.decoding.events import Event
from fast_dllm.decoding.state import DecodeState, absorb
from fast_dllm.engine.executor import Executor
from fast_dllm.engine.prefix import PrefixIndex
from fast_dllm.engine.request import Request
from fast_dllm.engine.scheduler import Scheduler
from fast_dllm.errors import FastDLLMError
from fast_dllm.model.backbone import Backbone


def open_state(
    backbone: Backbone,
    config: BlockDiffusionConfig,
    prompt: Sequence[int],
    decoding: DecodingConfig,
    stop_token_ids: Sequence[int],
) -> DecodeState:
    """The state of a new request, checked against the model before anything is allocated for it.

    Args:
        backbone: the model.
        config: what the checkpoint is.
        prompt: token ids.
        decoding: what is asked.
        stop_token_ids: of the checkpoint.

    Raises:
        FastDLLMError: for a request that the model cannot run.
    """
    last, mask = backbone.vocabulary - 1, config.mask_token_id
    for token in prompt:
        if not (isinstance(token, int) and 0 <= token <= last):
            raise FastDLLMError(f"token id {token!r} is not in the vocabulary; ids run from 0 to {last}")
    if mask is not None and mask > last:
        raise FastDLLMError(f"mask token id {mask} is not in the vocabulary; ids run from 0 to {last}")
    state = DecodeState(prompt, config, decoding, stop_token_ids)
    longest = backbone.max_length
    if longest is not None and state.limit > longest:
        raise FastDLLMError(
            f"prompt of {len(prompt)} tokens and max_new_tokens={decoding.max_new_tokens} exceed the model's "
            f"{longest} positions; shorten the prompt or lower max_new_tokens"
        )
    return state


class Engine:
    """Decodes requests: a tick asks each what it needs, runs one forward over all, and lets each absorb.

    Rows never wait for each other's blocks, and a row's tokens depend neither on its neighbours nor on when it runs.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: BlockDiffusionConfig,
        *,
        slots: int,
        max_length: int,
        stop_token_ids: Sequence[int] = (),
        token_budget: int | None = None,
        prefill_chunk: int | None = 512,
        prefix_cache: bool = True,
        draft_budget: int | None = None,
    ) -> None:
        """Allocate the cache.

        Args:
            backbone: the model.
            config: what the checkpoint is.
            slots: requests that run at once; further ones wait.
            max_length: positions per slot (`DecodeState.capacity` of the longest request).
            stop_token_ids: of the checkpoint.
            token_budget: positions that the running requests may hold together: what they have committed, and
                their blocks. When a block does not fit, the youngest request gives its slot back, and computes its
                K/V again when there is room. None: as many as the slots have.
            prefill_chunk: most prompt positions of a tick, so that a long prompt does not hold up the rows that
                decode; rounded to whole blocks, at least one, unless attention is causal. None: prompts run whole.
            prefix_cache: keep the K/V of requests that have ended until their slot is needed, and let a request
                whose beginning is known, from those or from a running one, start behind it.
            draft_budget: masks that a tick looks at, shared by the rows that verify their drafts: the more rows, the
                less each drafts, down to AR decoding. Of its share a row drafts what has lately proved promising
                (`Request.promising`). Answers depend on neither. None: the backbone's.

        Raises:
            FastDLLMError: for a size below 1.
        """
        sizes = {"slots": slots, "max_length": max_length, "prefill_chunk": prefill_chunk, "draft_budget": draft_budget}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise FastDLLMError(f"{name}={size}: must be 1 or more, or None where there is to be no limit")
        self._config = config
        self._backbone = backbone
        self._cache: KVCache = backbone.new_cache(slots, max_length)
        self._executor = Executor(backbone, config)
        if draft_budget is None:
            draft_budget = backbone.draft_budget
        self._scheduler = Scheduler(token_budget, prefill_chunk, draft_budget)
        self._prefixes = PrefixIndex(config.context_attention) if prefix_cache else None
        self._token_budget = token_budget
        self._stop_token_ids = tuple(stop_token_ids)
        self._submitted = 0

    def submit(self, prompt: Sequence[int], decoding: DecodingConfig) -> Request:
        """Queue a request.

        Args:
            prompt: token ids.
            decoding: what is asked.

        Returns:
            The request; its `state` holds the answer when it has ended.

        Raises:
            FastDLLMError: when it cannot run, or has stop strings: the engine knows ids alone.
        """
        if decoding.stop_strings:
            raise FastDLLMError("stop_strings need text: use BlockDiffusionLM.stream, or stop_token_ids")
        return self.enqueue(open_state(self._backbone, self._config, prompt, decoding, self._stop_token_ids), decoding)

    def enqueue(self, state: DecodeState, decoding: DecodingConfig) -> Request:
        """Queue a request that is already open.

        Args:
            state: as `open_state` gave it.
            decoding: what is asked.

        Raises:
            FastDLLMError: when it cannot fit.
        """
        if state.capacity > self._cache.max_length:
            raise FastDLLMError(
                f"the request needs {state.capacity} positions, a cache slot has {self._cache.max_length}; "
                "give the engine a larger max_length"
            )
        if self._token_budget is not None and state.capacity > self._token_budget:
            raise FastDLLMError(
                f"the request needs {state.capacity} positions, the token budget is {self._token_budget}; "
                "lower max_new_tokens or give the engine a larger token_budget"
            )
        request = Request(self._submitted, state, decoding)
        self._submitted += 1
        self._scheduler.waiting.append(request)
        return request

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or running."""
        return not (self._scheduler.waiting or self._scheduler.running)

    def step(self) -> list[Event]:
        """One tick: every running request advances by one forward.

        Only a prefill for which the tick has no room, and a block for which the token budget has none, wait.

        Returns:
            One event per request that ran.
        """
        for request in self._scheduler.begin():
            self._release(request)
            request.state.rewind()
        while (admitted := self._scheduler.admit(self._cache.free_slots)) is not None:
            self._place(admitted)
            self._scheduler.plan(admitted)
        rows = self._scheduler.rows()
        events = []
        for row, revealed in zip(rows, self._executor.run(rows, self._cache), strict=True):
            event = absorb(row.request.state, row.forward, row.request.id, revealed)
            row.request.note()
            events.append(event)
            if event.finish is not None:
                self._retire(row.request)
        return events

    def run(self) -> Iterator[Event]:
        """Tick until nothing is left, yielding events as they happen."""
        while not self.idle:
            yield from self.step()

    def cancel(self, request: Request) -> None:
        """End a request now; its slot is free at once. Nothing happens if it has ended."""
        if request.state.finish is None:
            request.state.finish = "cancelled"
            self._retire(request)

    def _retire(self, request: Request) -> None:
        self._scheduler.retire(request)
        if request.slot is not None:
            self._release(request)

    def _place(self, request: Request) -> None:
        """Give a request a slot, and in it what is known of its beginning."""
        if self._prefixes is None:
            request.slot = self._cache.allocate()
            return
        for running in self._scheduler.running:
            if running.slot is not None:
                self._prefixes.hold(running.slot, running.state)
        place = self._prefixes.place(request.state, set(self._cache.available))
        request.slot = self._cache.allocate(place.slot)
        if place.source != place.slot:
            self._cache.copy(place.source, place.slot, place.length)
        if place.length:
            request.state.adopt(place.length)

    def _release(self, request: Request) -> None:
        assert request.slot is not None
        if self._prefixes is not None:
            self._prefixes.retain(request.slot, request.state)
        self._cache.free(request.slot)
        request.slot = None
