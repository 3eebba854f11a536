"""Prompts to answer, from a file or standard input."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fast_dllm.data.rows import PROMPT_ROW, json_object, prompt_of
from fast_dllm.data.sources import BadRows, decode, numbered_lines, open_file
from fast_dllm.errors import FastDLLMError
from fast_dllm.text import Message


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


def read_prompts(path: str | Path, *, replace_answers: bool = False, bad: BadRows | None = None) -> list[Prompt]:
    """Read prompts to answer.

    Args:
        path: a `.txt` file has one prompt per line; a `.jsonl` file rows of {"prompt": str}, {"messages": [...]}, or
            a conversation as training data has it, with an optional "id". "-" is standard input; it, and a file
            named otherwise, is taken for JSONL when it begins with a brace. Blank lines are skipped.
        replace_answers: take conversations that end with an answer too, without it.
        bad: told of every row that cannot be used; None refuses the first.

    Raises:
        FastDLLMError: for a file that cannot be read or has no prompt, or a bad row (naming file and line).

    """
    bad = BadRows() if bad is None else bad
    is_stdin = str(path) == "-"
    name = "standard input" if is_stdin else str(path)
    if is_stdin:
        lines = list(numbered_lines(sys.stdin.buffer))
    else:
        with open_file(Path(path)) as file:
            lines = list(numbered_lines(file))
    suffix = "" if is_stdin else Path(path).suffix.lower()
    begins_with_brace = bool(lines) and lines[0][1].lstrip().startswith(b"{")
    is_json = suffix in (".jsonl", ".json") or (suffix != ".txt" and begins_with_brace)
    prompts = []
    for number, line in lines:
        place = f"{name}:{number}"
        try:
            prompts.append(_prompt(decode(line), place, is_json=is_json, replace_answers=replace_answers))
        except FastDLLMError as error:
            bad.add(place, error)
    if not prompts:
        raise FastDLLMError(f"{name}: has no prompts; write one per line, as plain text or {PROMPT_ROW}")
    return prompts


def _prompt(line: str, place: str, *, is_json: bool, replace_answers: bool) -> Prompt:
    if not is_json:
        return Prompt([{"role": "user", "content": line}], place=place)
    row = json_object(line, PROMPT_ROW)
    return Prompt(prompt_of(row, replace_answer=replace_answers), _identity(row), place)


def _identity(row: Mapping[str, Any]) -> str | int | None:
    identity = row.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, (str, int))):
        raise FastDLLMError(f"id is {type(identity).__name__}; use a string or an integer")
    return identity
