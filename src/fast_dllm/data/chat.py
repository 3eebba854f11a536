"""Conversations and texts to token ids and loss positions, through the tokenizer's own chat template."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fast_dllm.data.rows import Content
from fast_dllm.errors import FastDLLMError
from fast_dllm.text import Message, check_messages, render_messages, special_token_ids

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Stands for a turn's content: no template looks for it, trims it, or escapes it.
_MARKER = "a1b2c3d4e5f6"

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """One training document.

    Attributes:
        input_ids: n token ids.
        loss_mask: n flags; True where the token is to be learned.
        truncated: the end was cut off to keep to a maximal length. All of the loss positions may have gone with
            it: drop a sample where `any(loss_mask)` is false.
        lost_ends: assistant turns whose end, the end-of-turn token with it, was cut off.
    """

    input_ids: list[int]
    loss_mask: list[bool]
    truncated: bool = False
    lost_ends: int = 0


def render(tokenizer: Any, content: Content, *, max_length: int | None = None) -> list[Sample]:
    """A conversation as one sample (`render_chat`), a text as one or more (`render_text`).

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        content: the conversation or text.
        max_length: most tokens of a sample.

    Raises:
        FastDLLMError: as `render_chat`.
    """
    if isinstance(content, str):
        return render_text(tokenizer, content, max_length=max_length)
    return [render_chat(tokenizer, content, max_length=max_length)]


def render_chat(tokenizer: Any, messages: object, *, max_length: int | None = None) -> Sample:
    """A conversation with loss on what the assistant says.

    Loss positions are the tokens of every assistant turn: its text, the end-of-turn token, and the newline after
    it where the template has one. A template with `{% generation %}` marks says where the text is; in any other it
    is what stands between the generation prompt and the next turn. A token that holds characters of both the
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


def render_text(tokenizer: Any, text: str, *, max_length: int | None = None) -> list[Sample]:
    """Plain text to continue, with the tokenizer's end-of-text token behind it.

    There is loss on every token but the first, which nothing predicts. A longer text is cut into windows that
    overlap by one token, so that every other token is learned exactly once.

    Args:
        tokenizer: a Hugging Face tokenizer; its own special tokens are added.
        text: the document.
        max_length: most tokens of a window, 2 or more; None makes one of any length.
    """
    ids = list(tokenizer(text)["input_ids"])
    end = tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids.append(int(end))
    step = max(len(ids), 1) if max_length is None else max_length - 1
    windows = [ids[start : start + step + 1] for start in range(0, max(len(ids) - 1, 1), step)]
    return [Sample(window, [position > 0 for position in range(len(window))]) for window in windows]


def _cut(sample: Sample, max_length: int | None) -> Sample:
    loss = sample.loss_mask
    if max_length is None or len(loss) <= max_length:
        return sample
    lost = sum(here and not after for here, after in zip(loss[max_length:], [*loss[max_length + 1 :], False]))
    return Sample(sample.input_ids[:max_length], loss[:max_length], truncated=True, lost_ends=lost)


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
        begin = _end_of_turn(tokenizer, turns, index - 1, text, add_generation_prompt=True)
        end = _end_of_turn(tokenizer, turns, index, text, add_generation_prompt=False)
        if begin is None or end is None or begin > end:
            raise FastDLLMError(
                f"message {index + 1}: the chat template writes this turn differently when the conversation goes on "
                "(or not behind its generation prompt), so its tokens cannot be told apart; "
                "mark the assistant's text with {% generation %} in the template"
            )
        spans.append((begin, end))
    return spans


def _end_of_turn(
    tokenizer: Any, turns: Sequence[Message], index: int, text: str, *, add_generation_prompt: bool
) -> int | None:
    """Where a turn ends in the text of the whole conversation; None where that cannot be told exactly.

    Args:
        tokenizer: with the chat template.
        turns: the whole conversation.
        index: of the turn.
        text: of the whole conversation.
        add_generation_prompt: count the opening of an answer that would follow as the turn's.
    """
    if index == len(turns) - 1 and not add_generation_prompt:
        return len(text)
    through = turns[: index + 1]
    written = render_messages(tokenizer, through, add_generation_prompt=add_generation_prompt)
    if text.startswith(written):
        return len(written)
    # The template writes the turn, or one before it, differently as the last one (Qwen3 drops earlier thoughts). What
    # it writes behind the turn's content is found by putting a marker in its place: first alone, then with the rest.
    marked = {**turns[index], "content": _MARKER}
    alone = render_messages(tokenizer, [*turns[:index], marked], add_generation_prompt=add_generation_prompt)
    whole = render_messages(tokenizer, [*turns[:index], marked, *turns[index + 1 :]], add_generation_prompt=False)
    if alone.count(_MARKER) != 1 or whole.count(_MARKER) != 1:
        return None
    closing, rest = alone.partition(_MARKER)[2], whole.partition(_MARKER)[2]
    if not closing or not rest.startswith(closing) or not text.endswith(rest):
        return None
    return len(text) - len(rest) + len(closing)


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
