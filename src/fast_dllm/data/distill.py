"""Chats to train on, answered by a model itself."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TextIO, TypeVar

from fast_dllm.config import ONE_AT_A_TIME, DecodingConfig
from fast_dllm.data.prompts import Prompt
from fast_dllm.data.sources import BadRows
from fast_dllm.errors import FastDLLMError
from fast_dllm.files import unwritable, whole_file
from fast_dllm.text import Message

# Prompts handed to the model at once, per row of a batch: so many that few rows idle at the end.
_ROUND = 32
_REFUSED = "refused"


class Answer(Protocol):
    """What `Answering` gives: a `Reply`."""

    @property
    def text(self) -> str:
        """The answer, without special tokens."""

    @property
    def finish(self) -> str | None:
        """Why it ended: "stop" is a stop token."""


_Answer = TypeVar("_Answer", bound=Answer, covariant=True)


class Answering(Protocol[_Answer]):
    """What can answer: a `BlockDiffusionLM`."""

    def answers(self, prompts: Any, decoding: DecodingConfig, *, max_batch: int) -> Iterator[_Answer]:
        """Answer prompts, in their order; prompt i draws from seed + i."""


@dataclass(frozen=True)
class DistillResult:
    """What a run came to, over all its resumptions.

    Attributes:
        prompts: that were asked; of a conversation all questions are one.
        kept: chats written.
        unfinished: answers that reached the limit of new tokens; written only if asked for.
        empty: answers without text; never written.
        refused: questions that the model does not take, being too long for it.
    """

    prompts: int
    kept: int
    unfinished: int
    empty: int
    refused: int


def autoregressive(
    *, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> DecodingConfig:
    """Settings of one token at a time, as a model answers before it is adapted."""
    return DecodingConfig(
        **ONE_AT_A_TIME, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )


def distill(
    model: Answering[_Answer],
    prompts: Sequence[Prompt],
    out: str | Path,
    decoding: DecodingConfig,
    *,
    name: str = "",
    batch_size: int = 8,
    keep_unfinished: bool = False,
    bad: BadRows | None = None,
    watch: Callable[[Iterator[_Answer], int], Iterable[_Answer]] | None = None,
) -> DistillResult:
    """Answer prompts with a model, and write the conversations down to train on.

    Of a conversation the model answers each question, over its own answers to those before: whoever answered them
    first is not learned. One that is not answered to its end is written as far as it was.

    Every answer is written to `out`.part as it comes. A run that was stopped, however it was, goes on behind the last
    whole line of it when called again with the same model, prompts and settings; the outcome is the same.

    Args:
        model: a `BlockDiffusionLM`.
        prompts: what to ask.
        out: gets a line {"messages": [...]} for each conversation with an answer that is kept, in the order of the
            prompts, once all are answered.
        decoding: settings of all; question i draws from seed + i, all first questions being before all second ones.
        name: of the model; a run goes on only with a model of the same name.
        batch_size: prompts decoded at once.
        keep_unfinished: keep answers without a stop token at their end too.
        bad: told of every prompt whose first question the model does not take; None refuses the first. A later one
            ends its conversation.
        watch: given the answers and how many were there before; passes them on.

    Raises:
        FastDLLMError: when `out` is there already or cannot be written, when its part is of another run, or as `bad`.
    """
    out, chats = Path(out), [_Chat(prompt) for prompt in prompts]
    run = _Run(model, chats, decoding, batch_size, BadRows() if bad is None else bad)
    part = out.with_name(f"{out.name}.part")
    if out.exists() and not part.exists():
        raise FastDLLMError(f"{out}: is there already; remove it, or choose another name")
    records = _read_part(part, run.settings(name))
    with _opened_part(part, records, run.settings(name)) as file:
        answers = run.answers(records, file)
        for _ in answers if watch is None else watch(answers, len(records)):
            pass
    rows = [row for chat in chats if (row := chat.row(keep_unfinished=keep_unfinished))]
    with whole_file(out) as file:
        file.writelines(_line(row) for row in rows)
    part.unlink()
    finishes = [record["finish"] for record in records]
    return DistillResult(
        prompts=len(prompts),
        kept=len(rows),
        unfinished=finishes.count("length"),
        empty=sum(record["finish"] == "stop" and not record["text"].strip() for record in records),
        refused=finishes.count(_REFUSED),
    )


def questions(messages: Sequence[Message]) -> list[list[Message]]:
    """What a conversation asks, without the answers: the user's messages, each with the system's before it."""
    found: list[list[Message]] = [[]]
    for message in messages:
        if message["role"] != "assistant":
            found[-1].append(message)
        elif any(asked["role"] == "user" for asked in found[-1]):
            found.append([])
    return found if found[-1] else found[:-1]


@dataclass
class _Chat:
    """A prompt, and the records of its questions so far."""

    prompt: Prompt
    records: list[dict[str, Any]] = field(default_factory=list)

    def next(self) -> list[Message] | None:
        """What the model is asked next; None where the last answer failed or no question is left."""
        asked = questions(self.prompt.messages)[len(self.records) :]
        is_over = not asked or not all(_is_kept(record, keep_unfinished=False) for record in self.records)
        return None if is_over else [*self._answered(self.records), *asked[0]]

    def row(self, *, keep_unfinished: bool) -> dict[str, Any] | None:
        """The conversation to train on; None where there is no answer to learn from."""
        kept = [record for record in self.records if _is_kept(record, keep_unfinished=keep_unfinished)]
        identity = {} if self.prompt.id is None else {"id": self.prompt.id}
        return {**identity, "messages": self._answered(kept)} if kept else None

    def _answered(self, records: Sequence[dict[str, Any]]) -> list[Message]:
        turns = zip(questions(self.prompt.messages), records)
        return [x for asked, record in turns for x in (*asked, {"role": "assistant", "content": record["text"]})]


@dataclass
class _Run(Generic[_Answer]):
    """Conversations on their way through a model."""

    model: Answering[_Answer]
    chats: Sequence[_Chat]
    decoding: DecodingConfig
    batch_size: int
    bad: BadRows

    def settings(self, name: str) -> dict[str, Any]:
        """What a run must share with the one it goes on from. Not the batch size: no answer depends on it."""
        asked = json.dumps([questions(chat.prompt.messages) for chat in self.chats])
        digest = hashlib.sha256(asked.encode()).hexdigest()
        decoding = json.loads(json.dumps(self.decoding.to_dict()))
        return {"model": name, "prompts": digest, "decoding": decoding}

    def answers(self, records: list[dict[str, Any]], file: TextIO) -> Iterator[_Answer]:
        """Answer what has no record yet; each answer gets one, in memory and in the file."""
        first = 0
        while asked := [(chat, messages) for chat in self.chats if (messages := chat.next())]:
            yield from self._answer(asked, first, records, file)
            for (chat, _), record in zip(asked, records[first:]):
                chat.records.append(record)
            first += len(asked)

    def _answer(
        self, asked: Sequence[tuple[_Chat, list[Message]]], first: int, records: list[dict[str, Any]], file: TextIO
    ) -> Iterator[_Answer]:
        """Answer a question of each chat, the first of which gets record `first`."""
        while (start := len(records) - first) < len(asked):
            stop = min(start + _ROUND * self.batch_size, len(asked))
            here = asked[start:stop]
            try:
                answers = self._ask(here, len(records))
            except FastDLLMError as error:
                here = here[: self._first_refused(here, error)]
                if not here:
                    _record(records, file, _REFUSED, "")
                    continue
                answers = self._ask(here, len(records))
            for answer in answers:
                _record(records, file, str(answer.finish), answer.text)
                yield answer

    def _ask(self, asked: Sequence[tuple[_Chat, list[Message]]], number: int) -> Iterator[_Answer]:
        decoding = replace(self.decoding, seed=self.decoding.seed + number)
        return self.model.answers([messages for _, messages in asked], decoding, max_batch=self.batch_size)

    def _first_refused(self, asked: Sequence[tuple[_Chat, list[Message]]], error: FastDLLMError) -> int:
        for number, one in enumerate(asked):
            try:
                self._ask([one], number)
            except FastDLLMError as refusal:
                chat, _ = one
                if not chat.records:
                    self.bad.add(chat.prompt.place, refusal)
                return number
        raise error


def _record(records: list[dict[str, Any]], file: TextIO, finish: str, text: str) -> None:
    record = {"finish": finish, "text": text}
    records.append(record)
    file.write(_line(record))
    file.flush()


def _is_kept(record: dict[str, Any], *, keep_unfinished: bool) -> bool:
    has_end = record["finish"] == "stop" or (keep_unfinished and record["finish"] == "length")
    return has_end and bool(record["text"].strip())


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_part(part: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of an earlier run; none where there was no such run."""
    try:
        lines = part.read_bytes().split(b"\n")[:-1]  # what stands behind the last newline was not written whole
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FastDLLMError(f"{part}: cannot be read ({error.strerror})") from error
    try:
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise FastDLLMError(f"{part}: is damaged ({error}); remove it to begin anew") from error
    if rows and rows[0] != settings:
        raise FastDLLMError(
            f"{part}: belongs to a run with another model, prompts or settings; remove it, or choose another --out"
        )
    return rows[1:]


@contextmanager
def _opened_part(part: Path, records: Sequence[dict[str, Any]], settings: dict[str, Any]) -> Iterator[TextIO]:
    """The part, with the answers that are there, ready for more."""
    with whole_file(part) as file:
        file.writelines(_line(row) for row in (settings, *records))
    try:
        file = part.open("a", encoding="utf-8")
    except OSError as error:
        raise unwritable(part, error) from error
    with file:
        yield file
