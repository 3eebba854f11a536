"""What a row of a data set may look like, and the conversation, text or prompt that it is."""

import json
from collections.abc import Mapping
from typing import Any

from fast_dllm.errors import FastDLLMError
from fast_dllm.text import Message, check_messages

CHAT_ROW = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
PROMPT_ROW = '{"prompt": "..."} or {"messages": [...]}'

Content = list[Message] | str
"""A conversation, or plain text to continue."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


def json_object(line: str, shape: str) -> Mapping[str, Any]:
    """The JSON object on a line.

    Args:
        line: one line of a file.
        shape: what it should look like, for the error.

    Raises:
        FastDLLMError: when it is something else.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise FastDLLMError(f"not JSON ({error.msg} at column {error.colno}); each line must be {shape}") from error
    except RecursionError as error:
        raise FastDLLMError(f"nested too deeply; each line must be {shape}") from error
    return check_object(row, f"each line must be {shape}")


def check_object(row: object, remedy: str) -> Mapping[str, Any]:
    """The row itself.

    Raises:
        FastDLLMError: when it is no object.
    """
    if not isinstance(row, Mapping):
        raise FastDLLMError(f"a JSON {type(row).__name__}, not an object; {remedy}")
    return row


def content_of(row: Mapping[str, Any]) -> Content:
    """What a row of training data holds.

    A conversation is {"messages": [{"role", "content"}, ...]}, or as ShareGPT writes it ({"conversations":
    [{"from", "value"}, ...]}), or as Alpaca does ({"instruction", "input", "output"}); a text to continue is
    {"text": "..."}. Other keys are ignored.

    Raises:
        FastDLLMError: for another shape, a malformed conversation, or one without an answer to learn from.
    """
    conversation = _conversation(row)
    if conversation is None and "text" in row:
        if not _string(row, "text").strip():
            raise FastDLLMError("text is empty; drop the row")
        return str(row["text"])
    if conversation is None:
        raise FastDLLMError(f"no messages (keys: {', '.join(row) or 'none'}); each row must be {CHAT_ROW}")
    roles = [message["role"] for message in conversation]
    if "assistant" not in roles:
        raise FastDLLMError("no assistant turn, so nothing to learn from; add the answer or drop the row")
    if "user" not in roles[: roles.index("assistant")]:
        raise FastDLLMError("the assistant speaks before the user; begin with a user turn or drop the row")
    return conversation


def prompt_of(row: Mapping[str, Any], *, replace_answer: bool = False) -> list[Message]:
    """What a row asks: {"prompt": "..."}, or a conversation in any shape that `content_of` takes.

    Args:
        row: of a file of prompts.
        replace_answer: drop an answer at the end of a conversation; otherwise it is an error. A row with a prompt
            beside the conversation (as data sets of chats have it) is that conversation; otherwise it is an error too.

    Raises:
        FastDLLMError: for another shape, or a conversation that does not end with the user's message.
    """
    is_chat = row.get("messages") is not None
    if row.get("prompt") is not None and not (is_chat and replace_answer):
        if is_chat:
            raise FastDLLMError("has both prompt and messages; keep one")
        if not _string(row, "prompt").strip():
            raise FastDLLMError("prompt is empty; write what to ask or drop the row")
        return check_messages([{"role": "user", "content": row["prompt"]}])
    messages = _conversation(row)
    if messages is None:
        raise FastDLLMError(f"no prompt (keys: {', '.join(row) or 'none'}); each row must be {PROMPT_ROW}")
    while replace_answer and messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user":
        last = messages[-1]["role"] if messages else "assistant"
        raise FastDLLMError(f"the last message is the {last}'s; end with a user message")
    return messages


def _conversation(row: Mapping[str, Any]) -> list[Message] | None:
    if row.get("messages") is not None:
        return check_messages(row["messages"])
    if row.get("conversations") is not None:
        return check_messages(_from_sharegpt(row))
    if "instruction" in row and "output" in row:
        return check_messages(_from_alpaca(row))
    return None


def _from_sharegpt(row: Mapping[str, Any]) -> object:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise FastDLLMError('conversations is not a list; write [{"from": "human", "value": "..."}, ...]')
    return _system(row) + [_from_sharegpt_turn(number, turn) for number, turn in enumerate(turns, start=1)]


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
    question, answer = _string(row, "instruction"), _string(row, "output")
    if row.get("input"):
        question = f"{question}\n\n{_string(row, 'input')}"
    return [*_system(row), {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _system(row: Mapping[str, Any]) -> list[object]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _string(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise FastDLLMError(f"{key} is {type(row[key]).__name__}, not a string")
    return str(row[key])
