"""Conversations and prompts from files and the Hugging Face hub; a bad row is an error that names file and line."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fast_dllm.errors import FastDLLMError
from fast_dllm.text import Message, check_messages

_Row = TypeVar("_Row")
_Parsed = TypeVar("_Parsed")

_CHAT_ROW = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
_PROMPT_ROW = '{"prompt": "..."} or {"messages": [...]}'
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a batch.

    Attributes:
        messages: the conversation to answer.
        id: the row's own "id", passed through to its answer; None where the row has none.

    """

    messages: list[Message]
    id: str | int | None = None


def read_chats(path: str | Path) -> list[list[Message]]:
    """Read conversations from a JSONL file, or a `.json` file that is one array of rows.

    A row is {"messages": [{"role", "content"}, ...]}, or as ShareGPT writes it ({"conversations": [{"from",
    "value"}, ...]}), or as Alpaca does ({"instruction", "input", "output"}). Other keys are ignored.

    Args:
        path: the file, UTF-8; blank lines are skipped.

    Returns:
        Conversations, each with an assistant turn after a user turn.

    Raises:
        FastDLLMError: for a file that cannot be read or is empty, or a bad row (naming file and line).

    """
    lines = list(_file_lines(path))
    if Path(path).suffix.lower() == ".json" and lines and lines[0][1].lstrip().startswith("["):
        chats = _parse_rows(f"{path} row", enumerate(_json_array(path, lines), start=1), _chat)
    else:
        chats = _parse_rows(str(path), lines, lambda line: _chat(_json_object(line, _CHAT_ROW)))
    if not chats:
        raise FastDLLMError(f"{path}: has no rows; each line must be {_CHAT_ROW}")
    return chats


def load_chats(source: str | Path, *, split: str = "train") -> list[list[Message]]:
    """Conversations from a JSONL file, a parquet file, or a data set of the Hugging Face hub.

    Args:
        source: a path, or a hub name "owner/name" where there is no such path.
        split: split of a hub data set.

    Raises:
        FastDLLMError: as `read_chats`; also when `datasets` is missing or cannot load the source.

    """
    path = Path(source)
    is_hub_name = not path.exists() and not path.suffix and len(path.parts) == 2 and not path.is_absolute()
    if path.suffix != ".parquet" and not is_hub_name:
        return read_chats(path)
    if not is_hub_name:
        _check_is_file(path)
    try:
        import datasets
    except ImportError as error:
        raise FastDLLMError(f"{source}: datasets is not installed; run pip install 'fast-dllm[train]'") from error
    # datasets raises what its file systems and the network raise.
    try:
        if is_hub_name:
            rows = datasets.load_dataset(str(source), split=split)
        else:
            rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:
        raise FastDLLMError(f"{source}: datasets cannot load it ({_one_line(error)})") from error
    chats = _parse_rows(f"{source} row", enumerate(rows, start=1), _chat)
    if not chats:
        raise FastDLLMError(f"{source}: has no rows")
    return chats


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts to answer.

    Args:
        path: a `.txt` file has one prompt per line; a `.jsonl` file rows of {"prompt": str} or {"messages": [...]},
            with an optional "id". "-" is standard input; it, and a file named otherwise, is taken for JSONL when
            it begins with a brace. Blank lines are skipped.

    Raises:
        FastDLLMError: for a file that cannot be read or is empty, or a bad row (naming file and line).

    """
    is_stdin = str(path) == "-"
    name = "standard input" if is_stdin else str(path)
    if is_stdin:
        lines = list(_decoded_lines(name, sys.stdin.buffer.read()))
    else:
        lines = list(_file_lines(path))
    if not lines:
        raise FastDLLMError(f"{name}: has no prompts; write one per line, as plain text or {_PROMPT_ROW}")
    suffix = "" if is_stdin else Path(path).suffix.lower()
    is_json = suffix in (".jsonl", ".json") or (suffix != ".txt" and lines[0][1].lstrip().startswith("{"))
    if is_json:
        return _parse_rows(name, lines, lambda line: _prompt(_json_object(line, _PROMPT_ROW)))
    return [Prompt([{"role": "user", "content": line}]) for _, line in lines]


def _parse_rows(name: str, rows: Iterable[tuple[int, _Row]], parse: Callable[[_Row], _Parsed]) -> list[_Parsed]:
    parsed = []
    for number, row in rows:
        try:
            parsed.append(parse(row))
        except FastDLLMError as error:
            raise FastDLLMError(f"{name}:{number}: {error}") from error
    return parsed


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise FastDLLMError(f"{path}: is a directory; name a file in it")
    if not path.exists():
        raise FastDLLMError(f"{path}: no such file; check the path")


def _file_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    _check_is_file(Path(path))
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise FastDLLMError(f"{path}: cannot be read ({error.strerror})") from error
    return _decoded_lines(str(path), content)


def _decoded_lines(name: str, content: bytes) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of the lines that are not blank."""
    # str.splitlines would also split at U+2028 and its like, which JSON allows inside a string.
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode("utf-8").strip("\r")
        except UnicodeDecodeError as error:
            raise FastDLLMError(f"{name}:{number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
        if text.strip():
            yield number, text


def _json_array(path: str | Path, lines: Iterable[tuple[int, str]]) -> list[Mapping[str, Any]]:
    try:
        rows = json.loads("\n".join(line for _, line in lines))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FastDLLMError(f"{path}: not a JSON array ({_one_line(error)}); write one row per line instead") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise FastDLLMError(f"{path} row:{number}: a JSON {type(row).__name__}, not an object; write {_CHAT_ROW}")
    return list(rows)


def _json_object(line: str, shape: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise FastDLLMError(f"not JSON ({error.msg} at column {error.colno}); each line must be {shape}") from error
    except RecursionError as error:
        raise FastDLLMError(f"nested too deeply; each line must be {shape}") from error
    if not isinstance(row, dict):
        raise FastDLLMError(f"a JSON {type(row).__name__}, not an object; each line must be {shape}")
    return row


def _chat(row: Mapping[str, Any]) -> list[Message]:
    if row.get("messages") is not None:
        messages = check_messages(row["messages"])
    elif row.get("conversations") is not None:
        messages = check_messages(_from_sharegpt(row))
    elif "instruction" in row and "output" in row:
        messages = check_messages(_from_alpaca(row))
    else:
        raise FastDLLMError(f"no messages (keys: {', '.join(row) or 'none'}); each row must be {_CHAT_ROW}")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise FastDLLMError("no assistant turn, so nothing to learn from; add the answer or drop the row")
    if "user" not in roles[: roles.index("assistant")]:
        raise FastDLLMError("the assistant speaks before the user; begin with a user turn or drop the row")
    return messages


def _from_sharegpt(row: Mapping[str, Any]) -> object:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise FastDLLMError('conversations is not a list; write [{"from": "human", "value": "..."}, ...]')
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return system + [_from_sharegpt_turn(number, turn) for number, turn in enumerate(turns, start=1)]


def _from_sharegpt_turn(number: int, turn: object) -> object:
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    if not isinstance(turn["from"], str) or turn["from"] not in _SHAREGPT_ROLES:
        known = ", ".join(_SHAREGPT_ROLES)
        raise FastDLLMError(f"message {number}: from {turn['from']!r} is unknown; use {known}")
    if "value" not in turn:
        raise FastDLLMError(f'message {number} has no "value"; write {{"from": ..., "value": ...}}')
    return {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}


def _from_alpaca(row: Mapping[str, Any]) -> object:
    for key in ("instruction", "output"):
        if not isinstance(row[key], str):
            raise FastDLLMError(f"{key} is {type(row[key]).__name__}, not a string")
    extra = row.get("input") or ""
    if not isinstance(extra, str):
        raise FastDLLMError(f"input is {type(extra).__name__}, not a string")
    question = f"{row['instruction']}\n\n{extra}" if extra else row["instruction"]
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _prompt(row: Mapping[str, Any]) -> Prompt:
    identity = row.get("id")
    if identity is not None and (isinstance(identity, bool) or not isinstance(identity, (str, int))):
        raise FastDLLMError(f"id is {type(identity).__name__}; use a string or an integer")
    if "prompt" in row and "messages" in row:
        raise FastDLLMError("has both prompt and messages; keep one")
    if "prompt" in row:
        if not isinstance(row["prompt"], str):
            raise FastDLLMError(f"prompt is {type(row['prompt']).__name__}, not a string")
        if not row["prompt"].strip():
            raise FastDLLMError("prompt is empty; write what to ask or drop the row")
        return Prompt(check_messages([{"role": "user", "content": row["prompt"]}]), identity)
    if "messages" not in row:
        raise FastDLLMError(f"no prompt (keys: {', '.join(row) or 'none'}); each line must be {_PROMPT_ROW}")
    messages = check_messages(row["messages"])
    if messages[-1]["role"] != "user":
        raise FastDLLMError(f"the last message is the {messages[-1]['role']}'s; end with a user message")
    return Prompt(messages, identity)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
