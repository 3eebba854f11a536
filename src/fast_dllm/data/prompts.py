"""Prompts to answer, from a file, a hub data set or standard input."""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast_dllm.data.rows import PROMPT_ROW, json_object, prompt_of
from fast_dllm.data.sources import (
    BadRows,
    Source,
    decode,
    numbered_lines,
    open_file,
    parse_sources,
    read_rows,
    usable,
)
from fast_dllm.errors import FastDLLMError
from fast_dllm.text import Message

_Asked = tuple[list[Message], str | int | None]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a batch.

    Attributes:
        messages: the conversation to answer.
        id: the row's own "id", passed through to its answer; None where the row has none.
        place: where it stands, such as "prompts.jsonl:12".
    """

    messages: list[Message]
    id: str | int | None = None
    place: str = field(default="", compare=False)


def read_prompts(data: object, *, replace_answers: bool = False, bad: BadRows | None = None) -> list[Prompt]:
    """Read prompts to answer.

    Rows are {"prompt": str}, {"messages": [...]}, or a conversation in another shape of training data, with an
    optional "id".

    Args:
        data: what `parse_sources` takes, without weights: files or hub data sets of rows, as `read_documents` reads
            them. A `.txt` file has one prompt per line instead. "-" is standard input; it, and a file named
            otherwise, is taken for JSONL when it begins with a brace, else for a prompt per line. Blank lines are
            skipped.
        replace_answers: take conversations that end with an answer too, without it.
        bad: told of every row that cannot be used; None refuses the first.

    Raises:
        FastDLLMError: for a source that cannot be read or has no prompt, or a bad row (naming file and line).
    """
    bad = BadRows() if bad is None else bad

    def asked(row: Mapping[str, Any]) -> _Asked:
        return prompt_of(row, replace_answer=replace_answers), _identity(row)

    prompts = []
    for source in parse_sources(data):
        rows = [Prompt(*of_row, place) for place, of_row in _rows(source, asked, bad)]
        if not rows:
            name = _name(source)
            raise FastDLLMError(f"{name}: has no prompts; write one per line, as plain text or {PROMPT_ROW}")
        prompts += rows
    return prompts


def _rows(source: Source, asked: Callable[[Mapping[str, Any]], _Asked], bad: BadRows) -> Iterator[tuple[str, _Asked]]:
    if source.weight is not None:
        raise FastDLLMError(f"{source.source}: prompts are asked once each, so they have no weight; leave it out")
    suffix = Path(source.source).suffix.lower()
    if source.is_hub_name or suffix in (".jsonl", ".json", ".parquet"):
        return read_rows(source, asked, bad, shape=PROMPT_ROW)
    lines = _lines(source)
    begins_with_brace = bool(lines) and lines[0][1].lstrip().startswith(b"{")
    if suffix != ".txt" and begins_with_brace:
        return usable(lines, lambda line: asked(json_object(decode(line), PROMPT_ROW)), bad)
    return usable(lines, lambda line: ([{"role": "user", "content": decode(line)}], None), bad)


def _lines(source: Source) -> list[tuple[str, bytes]]:
    # All at once: a pipe can be read once only.
    if source.source == "-":
        lines = list(numbered_lines(sys.stdin.buffer))
    else:
        with open_file(Path(source.source)) as file:
            lines = list(numbered_lines(file))
    return [(f"{_name(source)}:{number}", line) for number, line in lines]


def _name(source: Source) -> str:
    return "standard input" if source.source == "-" else source.source


def _identity(row: Mapping[str, Any]) -> str | int | None:
    identity = row.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, (str, int))):
        raise FastDLLMError(f"id is {type(identity).__name__}; use a string or an integer")
    return identity
