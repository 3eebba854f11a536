"""Answers as text while they are decoded: detokenising and stop strings over the engine's events."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fast_dllm.decoding.events import Event, FinishReason, Statistics
from fast_dllm.decoding.state import DecodeState
from fast_dllm.engine.engine import Engine
from fast_dllm.engine.request import Request
from fast_dllm.text import ChatText, StopStrings


@dataclass(frozen=True)
class TextEvent:
    """An `Event` of the decode loop, with the text that became final by it.

    Attributes:
        event: the forward and the tokens it revealed; `event.request` is the number of the prompt.
        text: new text, ready to be shown; the texts of a prompt put together are its answer.
        finish: why the answer ended, with its last event: "stop", "length" or "cancelled".
    """

    event: Event
    text: str
    finish: FinishReason | None


@dataclass(frozen=True)
class Reply:
    """A whole answer.

    Attributes:
        text: cut before the first stop string.
        ids: its token ids, the one that completed a stop string included.
        finish: "stop" or "length".
        statistics: forwards and tokens.
        seconds: wall time from the start of the batch to the end of this answer.
        reveal_steps: per token, the number of the forward that revealed it.
        confidences: per token, the model's confidence when it was revealed.
    """

    text: str
    ids: list[int]
    finish: FinishReason | None
    statistics: Statistics
    seconds: float
    reveal_steps: list[int]
    confidences: list[float]


class AnswerText:
    """The text of one answer on its way, made from its events alone.

    Attributes:
        end: position behind the token that completed a stop string; None while none did.
    """

    def __init__(self, prompt_length: int, stop_strings: Sequence[str], text: ChatText | None) -> None:
        """Start an answer.

        Args:
            prompt_length: tokens of the prompt.
            stop_strings: the answer ends before the first of them.
            text: None for a model without a tokenizer: the answer then has no text.
        """
        self._stops = StopStrings(stop_strings)
        self._detokenizer = None if text is None else text.detokenizer()
        self._fed = prompt_length
        self._ahead: dict[int, int] = {}  # revealed, with a mask before them
        self.end: int | None = None

    def feed(self, event: Event) -> str:
        """Text that can be shown after an event."""
        if self._detokenizer is None or self.end is not None:
            return ""
        self._ahead.update(zip(event.positions, event.tokens, strict=True))
        shown = ""
        while self._fed < event.settled and self.end is None:
            shown += self._show(self._detokenizer.feed([self._ahead.pop(self._fed)]), end=self._fed + 1)
            self._fed += 1
        if event.finish is not None and self.end is None:
            shown += self._show(self._detokenizer.flush(), end=event.settled) + self._stops.flush()
        return shown

    def _show(self, new: str, end: int) -> str:
        shown = self._stops.feed(new)
        self.end = end if self._stops.stopped else None
        return shown


class TextStream:
    """Answers as they are decoded: iterate over their `TextEvent`s.

    Attributes:
        states: of each prompt: ids, reveal steps, confidences and statistics so far.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], text: ChatText | None) -> None:
        """Made by `BlockDiffusionLM.stream`.

        Args:
            engine: with the requests queued, and no others.
            requests: in the order of their prompts.
            text: None for a model without a tokenizer: events then carry no text.
        """
        self._engine = engine
        self._requests = list(requests)
        self._texts = [
            AnswerText(request.state.prompt_length, request.decoding.stop_strings, text) for request in requests
        ]

    @property
    def states(self) -> list[DecodeState]:
        """Of each prompt."""
        return [request.state for request in self._requests]

    def __iter__(self) -> Iterator[TextEvent]:
        for event in self._engine.run():
            request, answer = self._requests[event.request], self._texts[event.request]
            text = answer.feed(event)
            finish = event.finish
            if answer.end is not None:
                self._engine.cancel(request)
                request.state.stop_at(answer.end)
                finish = request.state.finish
            yield TextEvent(event, text, finish)

    def replies(self) -> Iterator[Reply]:
        """Whole answers, in the order of the prompts, each as soon as it and those before it are done."""
        start = time.perf_counter()
        texts = [""] * len(self._requests)
        done: dict[int, Reply] = {}
        due = 0
        for event in self:
            number = event.event.request
            texts[number] += event.text
            if event.finish is not None:
                seconds = time.perf_counter() - start
                done[number] = _reply(self.states[number], texts[number], event.finish, seconds)
            while due in done:
                yield done.pop(due)
                due += 1


def _reply(state: DecodeState, text: str, finish: FinishReason, seconds: float) -> Reply:
    ids = state.answer()
    return Reply(
        text=text,
        ids=ids,
        finish=finish,
        statistics=state.statistics,
        seconds=seconds,
        reveal_steps=state.reveal_step[: len(ids)],
        confidences=state.confidences[: len(ids)],
    )
