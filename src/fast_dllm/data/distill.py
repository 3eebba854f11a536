"""Chats to train on, answered by a model itself."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TextIO, TypeVar

from fast_dllm.config import ONE_AT_A_TIME, DecodingConfig
from fast_dllm.data.prompts import Prompt
from fast_dllm.data.sources import BadRows
from fast_dllm.errors import FastDLLMError
from fast_dllm.files import unwritable, whole_file

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
        prompts: that were asked.
        kept: chats written.
        unfinished: answers that reached the limit of new tokens; written only if asked for.
        empty: answers without text; never written.
        refused: prompts that the model does not take, being too long for it.
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

    Every answer is written to `out`.part as it comes. A run that was stopped, however it was, goes on behind the last
    whole line of it when called again with the same model, prompts and settings; the outcome is the same.

    Args:
        model: a `BlockDiffusionLM`.
        prompts: what to ask.
        out: gets a line {"messages": [...]} for each answer that is kept, in the order of the prompts, once all are
            answered.
        decoding: settings of all; prompt i draws from seed + i.
        name: of the model; a run goes on only with a model of the same name.
        batch_size: prompts decoded at once.
        keep_unfinished: keep answers without a stop token at their end too.
        bad: told of every prompt that the model does not take; None refuses the first.
        watch: given the answers and how many were there before; passes them on.

    Raises:
        FastDLLMError: when `out` is there already or cannot be written, when its part is of another run, or as `bad`.

    """
    out = Path(out)
    run = _Run(model, prompts, decoding, batch_size, BadRows() if bad is None else bad)
    part = out.with_name(f"{out.name}.part")
    if out.exists() and not part.exists():
        raise FastDLLMError(f"{out}: is there already; remove it, or choose another name")
    records = _read_part(part, run.settings(name))
    with _opened_part(part, records, run.settings(name)) as file:
        answers = run.answers(records, file)
        for _ in answers if watch is None else watch(answers, len(records)):
            pass
    with whole_file(out) as file:
        for prompt, record in zip(prompts, records, strict=True):
            if _is_kept(record, keep_unfinished=keep_unfinished):
                file.write(_line(_chat(prompt, record["text"])))
    part.unlink()
    finishes = [record["finish"] for record in records]
    return DistillResult(
        prompts=len(prompts),
        kept=sum(_is_kept(record, keep_unfinished=keep_unfinished) for record in records),
        unfinished=finishes.count("length"),
        empty=sum(record["finish"] == "stop" and not record["text"].strip() for record in records),
        refused=finishes.count(_REFUSED),
    )


@dataclass
class _Run(Generic[_Answer]):
    """Prompts on their way through a model."""

    model: Answering[_Answer]
    prompts: Sequence[Prompt]
    decoding: DecodingConfig
    batch_size: int
    bad: BadRows

    def settings(self, name: str) -> dict[str, Any]:
        """What a run must share with the one it goes on from. Not the batch size: no answer depends on it."""
        asked = json.dumps([prompt.messages for prompt in self.prompts])
        digest = hashlib.sha256(asked.encode()).hexdigest()
        decoding = json.loads(json.dumps(self.decoding.to_dict()))
        return {"model": name, "prompts": digest, "decoding": decoding}

    def answers(self, records: list[dict[str, Any]], file: TextIO) -> Iterator[_Answer]:
        """Answer what has no record yet; each answer gets one, in memory and in the file."""
        while len(records) < len(self.prompts):
            start = len(records)
            stop = min(start + _ROUND * self.batch_size, len(self.prompts))
            try:
                answers = self._ask(start, stop)
            except FastDLLMError as error:
                stop = self._first_refused(range(start, stop), error)
                if stop == start:
                    _record(records, file, _REFUSED, "")
                    continue
                answers = self._ask(start, stop)
            for answer in answers:
                _record(records, file, str(answer.finish), answer.text)
                yield answer

    def _ask(self, start: int, stop: int) -> Iterator[_Answer]:
        decoding = replace(self.decoding, seed=self.decoding.seed + start)
        messages = [prompt.messages for prompt in self.prompts[start:stop]]
        return self.model.answers(messages, decoding, max_batch=self.batch_size)

    def _first_refused(self, numbers: Iterable[int], error: FastDLLMError) -> int:
        for number in numbers:
            try:
                self._ask(number, number + 1)
            except FastDLLMError as refusal:
                self.bad.add(self.prompts[number].place, refusal)
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


def _chat(prompt: Prompt, answer: str) -> dict[str, Any]:
    identity = {} if prompt.id is None else {"id": prompt.id}
    return {**identity, "messages": [*prompt.messages, {"role": "assistant", "content": answer}]}


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
