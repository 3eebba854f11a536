"""Conversations to token ids and loss positions, through the tokenizer's own chat template."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fast_dllm.errors import FastDLLMError
from fast_dllm.text import Message, check_messages, render_messages, special_token_ids

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One training document.

    Attributes:
        input_ids: n token ids.
        loss_mask: n flags; True where the token is to be learned.
        truncated: the end was cut off to keep to a maximal length. All of the loss positions may have gone with
            it: drop a sample where `any(loss_mask)` is false.

    """

    input_ids: list[int]
    loss_mask: list[bool]
    truncated: bool = False


def render_chat(tokenizer: Any, messages: object, *, max_length: int | None = None) -> Sample:
    """A conversation with loss on what the assistant says.

    Loss positions are the tokens of every assistant turn: its text, the end-of-turn token, and the newline after
    it where the template has one. A template with `{% generation %}` marks says where the text is; in any other it
    is what rendering one more turn adds behind the generation prompt. A token that holds characters of both the
    prompt and the answer (a newline merged with an answer's leading spaces) is the assistant's.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        messages: a list of {"role", "content"} with at least one assistant turn.
        max_length: cut longer samples to this many tokens (and mark them `truncated`).

    Raises:
        FastDLLMError: for malformed messages, or a template whose turns cannot be told apart.

    """
    turns = check_messages(messages)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise FastDLLMError("the conversation has no assistant turn, so nothing to learn from")
    if not getattr(tokenizer, "is_fast", False):
        raise FastDLLMError(f"{type(tokenizer).__name__} is a slow tokenizer; load the fast one (use_fast=True)")
    text = render_messages(tokenizer, turns, add_generation_prompt=False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoding["input_ids"])
    ranges = _token_ranges(encoding["offset_mapping"])
    if _GENERATION.search(tokenizer.get_chat_template()):
        loss = _learn_turn_ends(tokenizer, ids, ranges, _marked_spans(tokenizer, turns))
    else:
        loss = _in_spans(ranges, _added_spans(tokenizer, turns, text))
    return _cut(Sample(ids, loss), max_length)


def render_text(tokenizer: Any, text: str, *, max_length: int | None = None) -> Sample:
    """Plain text to continue: loss on every token but the first, which nothing predicts.

    Args:
        tokenizer: a Hugging Face tokenizer; its own special tokens are added.
        text: the document.
        max_length: cut longer samples to this many tokens (and mark them `truncated`).

    """
    ids = list(tokenizer(text)["input_ids"])
    return _cut(Sample(ids, [position > 0 for position in range(len(ids))]), max_length)


def _cut(sample: Sample, max_length: int | None) -> Sample:
    if max_length is None or len(sample.input_ids) <= max_length:
        return sample
    return Sample(sample.input_ids[:max_length], sample.loss_mask[:max_length], truncated=True)


def _token_ranges(offsets: Iterable[Span]) -> list[Span]:
    """The characters [start, end) each token stands for, without gaps.

    Byte-level tokenizers leave spaces out of the offsets they report (a token of spaces gets an empty range), so
    a token begins where the one before it ended.
    """
    ranges, reached = [], 0
    for start, end in offsets:
        ranges.append((min(start, reached), end))
        reached = max(reached, end)
    return ranges


def _in_spans(ranges: Sequence[Span], spans: Iterable[Span]) -> list[bool]:
    """Which tokens hold a character of a span; the bytes of one character all count."""
    inside = [False] * len(ranges)
    for first, last in spans:
        for index, (start, end) in enumerate(ranges):
            inside[index] |= start < last and end > first
    return inside


def _added_spans(tokenizer: Any, turns: Sequence[Message], text: str) -> list[Span]:
    """The characters of each assistant turn: from the end of its generation prompt to the end of the turn."""
    spans = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        if index == 0:
            raise FastDLLMError("message 1 is the assistant's; begin the conversation with a user message")
        prompt = render_messages(tokenizer, turns[:index], add_generation_prompt=True)
        through = render_messages(tokenizer, turns[: index + 1], add_generation_prompt=False)
        if not (text.startswith(through) and through.startswith(prompt)):
            raise FastDLLMError(
                f"message {index + 1}: the chat template writes this turn differently when the conversation goes on "
                "(or not behind its generation prompt), so its tokens cannot be told apart; "
                "mark the assistant's text with {% generation %} in the template"
            )
        spans.append((len(prompt), len(through)))
    return spans


def _marked_spans(tokenizer: Any, turns: Sequence[Message]) -> list[Span]:
    """The characters inside the template's `{% generation %}` marks.

    Not `apply_chat_template(return_assistant_tokens_mask=True)`: it looks characters up in the reported offsets,
    and loses a turn that begins with a space.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    _, spans = render_jinja_template(
        conversations=[list(turns)],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return [(start, end) for start, end in spans[0]]


def _learn_turn_ends(tokenizer: Any, ids: Sequence[int], ranges: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Loss on the marked spans, the end-of-turn tokens and newlines after them: some templates mark the text only."""
    special = special_token_ids(tokenizer)
    loss = _in_spans(ranges, spans)

    def is_newline(index: int) -> bool:
        return index < len(ids) and tokenizer.decode([ids[index]]) == "\n"

    for first, last in spans:
        after = next((index for index, (_, end) in enumerate(ranges) if end > last), len(ids))
        # A marked newline behind a marked end of turn: the special token that follows opens the next turn.
        if after == len(ids) or (last > first and is_newline(after - 1) and ids[after - 2] in special):
            continue
        if last > first and ids[after - 1] in special:
            loss[after] = is_newline(after)
        elif ids[after] in special:
            loss[after] = True
            if is_newline(after + 1):
                loss[after + 1] = True
    return loss
