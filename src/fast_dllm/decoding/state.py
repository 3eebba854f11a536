"""One request as a state machine: what it needs next (`next_forward`), what it learned (`absorb`).

It knows nothing of batches, tensors or text. Autoregressive decoding is a block of one; Algorithm 1 of
arXiv 2505.22618 is one block over the canvas, prompt inside, with its windows as sub-blocks.
"""

from collections.abc import Sequence

from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.decoding.events import Event, FinishReason, ForwardKind, Statistics
from fast_dllm.decoding.forward import Forward, Revealed
from fast_dllm.errors import FastDLLMError


class DecodeState:
    """The progress of one request.

    Attributes:
        ids: prompt, final tokens, and None where a token of the current block is still masked.
        prompt_length: tokens of the prompt.
        block_size: D of this request (the canvas, for a full-attention model).
        committed: tokens whose final K/V are in the cache.
        block_start: start of the current block; ahead of `committed` where a finished block is to be committed
            together with the first look at the next one.
        verifies: whether a block is a draft until the model, reading it token by token, has said the same.
        settled: position up to which every token is final.
        finish: why it ended, or None.
        reveal_step: per new token, the forward that revealed it.
        confidences: per new token.
        statistics: forwards and tokens so far.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        model: BlockDiffusionConfig,
        decoding: DecodingConfig,
        stop_token_ids: Sequence[int],
    ) -> None:
        """Start a request.

        Args:
            prompt: token ids.
            model: what the checkpoint is.
            decoding: what the request asks.
            stop_token_ids: used unless `decoding` names its own.

        Raises:
            FastDLLMError: for an empty prompt under token shift, or sizes that do not fit.
        """
        if not prompt and model.token_shift:
            raise FastDLLMError("empty prompt: the first token is predicted from the one before it; give at least one")
        self.ids: list[int | None] = list(prompt)
        self.prompt_length = len(prompt)
        self.limit = self.prompt_length + decoding.max_new_tokens
        self.block_size, self._sub_size = decoding.layout(model, self.limit)
        verifies = decoding.verifies(model)
        if verifies:
            self.block_size = self._sub_size  # a draft is looked at once: there is nothing to refine in a longer one
        self.verifies = verifies and self.block_size > 1
        self._cache, self._refresh = decoding.caching(model)
        self._shift = 1 if model.token_shift else 0
        own_stops = decoding.stop_token_ids
        self._stops = frozenset(stop_token_ids if own_stops is None else own_stops)
        whole_canvas = model.context_attention == "full"
        # Where no block goes beyond: a draft that is refused may let the next one begin anywhere.
        self._horizon = self.limit if self.verifies else self.capacity
        # Windows of Algorithm 1 tile the answer; sub-blocks tile the block.
        self._sub_origin = self.prompt_length if whole_canvas else 0
        whole_blocks = self.prompt_length // self.block_size * self.block_size
        self._prefill_end = 0 if whole_canvas else self.prompt_length if self.verifies else whole_blocks
        # A chunk of a prefill ends with a block, unless tokens look only at what came before them.
        self._chunk_unit = 1 if model.context_attention == "causal" else self.block_size
        self.committed = 0
        self.block_start = self._prefill_end
        self._fuses = (decoding.fused_commit or self.verifies) and self.block_size > 1
        self._sub_start = 0
        self._refreshed_at: int | None = None
        self._stale_from = 0
        self.settled = self.prompt_length
        self.finish: FinishReason | None = None
        self.reveal_step: list[int] = []
        self.confidences: list[float] = []
        self.statistics = Statistics()
        if self._prefill_end == 0 or self._fuses:
            self._open_block()

    @property
    def block_end(self) -> int:
        """End of the current block."""
        return min(self.block_start + self.block_size, self._horizon)

    @property
    def capacity(self) -> int:
        """Positions that the request may ever write to: its limit, rounded up to whole blocks if blocks are aligned."""
        return self.limit if self.verifies else -(-self.limit // self.block_size) * self.block_size

    def prefill_ids(self) -> list[int]:
        """Ids of the positions that are to be committed before the first block is opened."""
        return self.settled_ids(0, self._prefill_end)

    def adopt(self, length: int) -> None:
        """Take the K/V of the first positions as given: the cache holds them already.

        Args:
            length: at most that of `prefill_ids`. A position that predicts the next token is run in any case.
        """
        predicts_next = self._shift and self.settled == self._prefill_end
        self.committed = min(length, self._prefill_end - 1) if predicts_next else length
        self.statistics.reused_tokens += self.committed
        if self.committed == self._prefill_end:
            self._open_block()

    def draft(self, width: int) -> None:
        """Draft at most so many tokens at a time, if this request verifies: the answer does not depend on it.

        Args:
            width: 1 is AR decoding; more than the sub-block size is that size.
        """
        width = min(width, self._sub_size)
        if self.verifies and width != self.block_size:
            self.block_size = width
            self._truncate(self.block_start)  # between two forwards nothing of a block that verifies is revealed
            self._open_block()

    def rewind(self) -> None:
        """Forget the K/V: what was committed is prefilled again. Tokens stay, and so does what they will be.

        The state must be `restartable`.
        """
        self._prefill_end = max(self._prefill_end, self.committed)
        self.committed = 0
        self._refreshed_at = None

    def settled_ids(self, start: int, end: int) -> list[int]:
        """Final ids of positions [start, end), which must lie before `settled`."""
        return [token for token in self.ids[start:end] if token is not None]

    def answer(self) -> list[int]:
        """The new tokens: no masks, nothing behind the stop token or the limit."""
        return self.settled_ids(self.prompt_length, self.settled)

    def stop_at(self, end: int) -> None:
        """End the answer before a position, at most `settled`: what is settled from there on is no part of it."""
        self.finish = "stop"
        self.settled = end
        self.statistics.new_tokens = end - self.prompt_length

    def _open_block(self) -> None:
        """Mask the rest of the current block, and find its first sub-block with a mask."""
        missing = self.block_end - len(self.ids)
        self.ids += [None] * missing
        fresh = self.block_end - (self.prompt_length + len(self.reveal_step))
        self.reveal_step += [-1] * fresh
        self.confidences += [0.0] * fresh
        self._refreshed_at = None
        self._stale_from = self.block_end
        self._sub_start = self.block_start + self._sub_origin
        self._skip_finished_sub_blocks()

    def _truncate(self, end: int) -> None:
        """Forget the tokens of positions from `end` on."""
        del self.ids[end:], self.reveal_step[end - self.prompt_length :], self.confidences[end - self.prompt_length :]

    def _sub_end(self) -> int:
        return min(self._sub_start + self._sub_size, self.block_end)

    def _masked(self) -> tuple[int, ...]:
        """Masked positions of the current sub-block.

        Those behind the length limit take part too: the limit only cuts an answer, it does not change it.
        """
        return tuple(i for i in range(self._sub_start, self._sub_end()) if self.ids[i] is None)

    def _skip_finished_sub_blocks(self) -> None:
        while self._sub_start < self.block_end and None not in self.ids[self._sub_start : self._sub_end()]:
            self._sub_start += self._sub_size


def next_forward(state: DecodeState, prefill_chunk: int | None = None) -> Forward | None:
    """What the request needs now.

    Args:
        state: of the request.
        prefill_chunk: most positions of a prefill forward, rounded to whole blocks (at least one) where tokens
            of a block look at each other; None for no limit.

    Returns:
        The forward, or None when it has ended.
    """
    if state.finish is not None:
        return None
    if state.committed < state._prefill_end:
        end = _chunk_end(state, prefill_chunk)
        if end < state._prefill_end or not state._fuses:
            return _clean_forward(state, ForwardKind.PREFILL, end)
    if state.verifies and state.block_end - state.block_start <= 1:
        return _last_check(state)
    if _block_done(state):
        return _clean_forward(state, ForwardKind.COMMIT, state.block_end)
    if _needs_refresh(state):
        return _block_forward(state)
    candidates, end = state._masked(), state.block_end
    start = state._sub_start
    if state._refresh != "published":
        # The window takes in the position before it, where the shifted logit of its first token stands, and what was
        # revealed last: those K/V are still a mask's.
        start = max(min(start - state._shift, state._stale_from), state.block_start)
    stop = end if state._cache == "prefix" else state._sub_end()
    return Forward(ForwardKind.SUB_BLOCK, start, stop, end, state.block_start, candidates)


def restartable(state: DecodeState) -> bool:
    """Whether it may be rewound now: its next forward reads no K/V but those of committed tokens."""
    forward = next_forward(state)
    return forward is None or forward.kind is not ForwardKind.SUB_BLOCK


def _chunk_end(state: DecodeState, prefill_chunk: int | None) -> int:
    if prefill_chunk is None:
        return state._prefill_end
    unit = state._chunk_unit
    end = max((state.committed + prefill_chunk) // unit, state.committed // unit + 1) * unit
    return min(end, state._prefill_end)


def _clean_forward(state: DecodeState, kind: ForwardKind, end: int) -> Forward:
    # Under token shift the last position of a clean block predicts the first token of the next.
    predicts_next = state._shift and end == state.settled
    return Forward(
        kind, state.committed, end, end, end, (end,) if predicts_next else (), prefilled=_prefilled(state, end)
    )


def _block_forward(state: DecodeState) -> Forward:
    """A look at the whole block; what stands before it and is not committed yet is committed by it."""
    candidates, end = state._masked(), state.block_end
    if state.verifies:
        # Under token shift nothing is read at the last mask. A draft can do without its sight, which saves a position;
        # a block that is final needs it: the model learned on whole blocks.
        end -= state._shift
    if state.committed == state.block_start:
        return Forward(ForwardKind.BLOCK, state.committed, end, end, state.block_start, candidates)
    drafted = _unchecked(state, state.block_start)
    # Under token shift the block's first token is predicted by the last committed one, here and never again.
    follows = state._shift and candidates[0] == state.block_start
    return Forward(
        ForwardKind.COMMIT_BLOCK,
        state.committed,
        end,
        end,
        state.block_start,
        (*drafted, *candidates),
        certain=len(drafted) + follows,
        prefilled=_prefilled(state, end),
    )


def _last_check(state: DecodeState) -> Forward:
    """Verify a draft of which at most one token is missing: the forward that checks it predicts that one too."""
    end = state.block_end - 1
    drafted, prefilled = _unchecked(state, state.block_end), _prefilled(state, end)
    return Forward(
        ForwardKind.COMMIT, state.committed, end, end, end, drafted, certain=len(drafted), prefilled=prefilled
    )


def _unchecked(state: DecodeState, end: int) -> tuple[int, ...]:
    """Positions before `end` whose token is a draft; the first token of a draft is not: the model itself said it."""
    return tuple(range(state.settled, end)) if state.verifies else ()


def _prefilled(state: DecodeState, end: int) -> int:
    return max(min(end, state._prefill_end) - state.committed, 0)


def _block_done(state: DecodeState) -> bool:
    return state._sub_start >= state.block_end


def _needs_refresh(state: DecodeState) -> bool:
    if state._cache == "none" or state._refreshed_at is None:
        return True
    rule = state._refresh
    if rule == "published":
        return state.ids[state._sub_start] is None
    return rule == "sub-block" and state._refreshed_at != state._sub_start


def absorb(state: DecodeState, forward: Forward, request: int, revealed: Sequence[Revealed]) -> Event:
    """Take in what a forward brought.

    Args:
        state: changed in place.
        forward: as `next_forward` gave it.
        request: id for the event.
        revealed: (position, token, confidence) of the tokens to reveal.

    Returns:
        The event that tells of it.
    """
    step = state.statistics.forwards
    accepted, withdrawn = _check(state, revealed)
    if not withdrawn:
        _advance(state, forward)
    for position, token, confidence in accepted:
        state.ids[position] = token
        state.reveal_step[position - state.prompt_length] = step
        state.confidences[position - state.prompt_length] = confidence
    state._stale_from = min((position for position, _, _ in accepted), default=state.block_end)
    if state.committed >= state._prefill_end:
        state._skip_finished_sub_blocks()
    _settle(state)
    if state.verifies and state.finish is None and state.committed >= state._prefill_end:
        _end_draft(state)
        accepted = [token for token in accepted if token[0] < state.block_start]
    elif state._fuses and state.finish is None and state.committed == state.block_start and _block_done(state):
        state.block_start = state.block_end
        state._open_block()
    event = Event(
        request=request,
        kind=forward.kind,
        query_tokens=forward.end - forward.start,
        step=step,
        positions=tuple(position for position, _, _ in accepted),
        tokens=tuple(token for _, token, _ in accepted),
        confidences=tuple(confidence for _, _, confidence in accepted),
        settled=state.settled,
        withdrawn=withdrawn,
        prefilled=forward.prefilled,
        finish=state.finish,
    )
    state.statistics.count(event)
    state.statistics.new_tokens = state.settled - state.prompt_length
    return event


def _advance(state: DecodeState, forward: Forward) -> None:
    """Move the borders that a forward moves by having run."""
    if forward.kind in (ForwardKind.PREFILL, ForwardKind.COMMIT):
        state.committed = forward.end
        if state.committed >= state._prefill_end:
            state.block_start = max(state.block_start, state.committed)
            state._open_block()
    elif forward.kind is not ForwardKind.SUB_BLOCK:
        state.committed = state.block_start
        state._refreshed_at = state._sub_start


def _check(state: DecodeState, revealed: Sequence[Revealed]) -> tuple[list[Revealed], int]:
    """Compare a draft with what the model says of it.

    At the first difference the model's token takes the draft's place, and a new block begins with it: what was
    drafted or looked at behind it rested on the other token.

    Returns:
        What is new among the revealed, and how many drafted tokens were withdrawn.
    """
    new = []
    for position, token, confidence in revealed:
        if position >= state.block_start:
            new.append((position, token, confidence))
        elif state.ids[position] != token:
            withdrawn = state.block_start - position
            state.committed = state.block_start = position
            state._horizon = state.limit
            state._truncate(position)
            state._open_block()
            return [(position, token, confidence)], withdrawn
    return new, 0


def _end_draft(state: DecodeState) -> None:
    """End the draft before its first mask or behind its first stop token; what else was revealed is looked at anew."""
    end = state.block_start
    while end < state.block_end and state.ids[end] is not None:
        end += 1
        if state.ids[end - 1] in state._stops:
            state._horizon = end
            break
    state._truncate(end)
    state.block_start = end
    state._open_block()


def _settle(state: DecodeState) -> None:
    """Move the border of what is final; end at a stop token with no mask before it, or at the limit."""
    # Of a draft, the first token is the model's own: the forward that committed those before it predicted it.
    end = min(state.committed + 1, state.limit) if state.verifies else state.limit
    while state.settled < min(end, len(state.ids)):
        token = state.ids[state.settled]
        if token is None:
            return
        state.settled += 1
        if token in state._stops:
            state.finish = "stop"
            return
    if state.settled == state.limit:
        state.finish = "length"
