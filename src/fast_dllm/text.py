"""Between text and token ids: chat template, incremental detokenising, stop strings."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fast_dllm.errors import FastDLLMError

ROLES = ("system", "user", "assistant")
Message = dict[str, str]

# What decoding gives for bytes that are not (yet) a whole character.
_REPLACEMENT = "\ufffd"

# How SentencePiece tokenizers write the single bytes of characters they do not know.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def check_messages(messages: object) -> list[Message]:
    """The messages of a conversation, or an error that says which one is malformed.

    Args:
        messages: a list of {"role": "system" | "user" | "assistant", "content": str}; other keys are dropped.

    Raises:
        FastDLLMError: naming the message by its number, from 1.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise FastDLLMError('messages must be a list of {"role": ..., "content": ...}')
    if not messages:
        raise FastDLLMError("messages is empty; give at least one user message")
    return [_check_message(number, message) for number, message in enumerate(messages, start=1)]


def _check_message(number: int, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise FastDLLMError(f'message {number} is not an object; write {{"role": ..., "content": ...}}')
    for key in ("role", "content"):
        if key not in message:
            raise FastDLLMError(f'message {number} has no "{key}"; write {{"role": ..., "content": ...}}')
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise FastDLLMError(f"message {number}: role {role!r} is unknown; use {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise FastDLLMError(f"message {number}: content is {type(content).__name__}, not a string")
    if not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
        raise FastDLLMError(f"message {number}: content has half a surrogate pair, which is no character; remove it")
    return {"role": role, "content": content}


def render_messages(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool, continue_final_message: bool = False
) -> str:
    """The conversation as the tokenizer's chat template writes it.

    Args:
        tokenizer: with a chat template.
        messages: the conversation.
        add_generation_prompt: end where the assistant's answer begins.
        continue_final_message: end inside the last message, which is the beginning of an answer.

    Raises:
        FastDLLMError: when the tokenizer has no chat template, or the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise FastDLLMError(f"{name}: the tokenizer has no chat template; use a chat model, or set chat_template")
    # Templates are programs of their authors: they raise anything, jinja2.TemplateError above all.
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
    except Exception as error:
        raise FastDLLMError(f"the chat template refuses the conversation: {error}") from error
    return str(text)


class ChatText:
    """A Hugging Face tokenizer as the decoder's users need it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def prompt_ids(self, messages: object) -> list[int]:
        """A conversation as a prompt: the chat template up to where the assistant's answer begins.

        Args:
            messages: a list of {"role", "content"}.

        Raises:
            FastDLLMError: for malformed messages, or a tokenizer without a chat template.
        """
        text = render_messages(self.tokenizer, check_messages(messages), add_generation_prompt=True)
        return self.encode(text, add_special_tokens=False)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of plain text.

        Args:
            text: what to encode. Special tokens written in it are recognised.
            add_special_tokens: add what the tokenizer puts around a text, for example a beginning-of-text token.
        """
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are skipped."""
        # Cleaning up spaces would let a later token change earlier text, which a stream cannot take back.
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def detokenizer(self) -> "IncrementalDetokenizer":
        """A detokenizer for one answer."""
        return IncrementalDetokenizer(self)


def special_token_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that decoding skips: named special tokens, and added tokens marked special."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


class IncrementalDetokenizer:
    """Turns token ids, fed left to right as they become final, into text that will not change.

    What `feed` and `flush` return, put together, equals `ChatText.decode` of all ids.
    """

    def __init__(self, text: ChatText) -> None:
        self._text = text
        self._ids: list[int] = []
        # Decoding starts at the last piece that was given out: a tokenizer may write a token differently at the
        # beginning of a text (SentencePiece drops its space), so the new ones need a token before them.
        self._context = 0
        self._given = 0
        self._special = special_token_ids(text.tokenizer)
        self._in_bytes = False

    def feed(self, ids: Iterable[int]) -> str:
        """Text that became certain with these ids; an incomplete UTF-8 sequence waits for its end."""
        new = ""
        # One at a time, so that the text does not depend on how the ids were split into calls.
        for token in ids:
            self._ids.append(token)
            if token not in self._special:
                written = self._text.tokenizer.convert_ids_to_tokens(token)
                self._in_bytes = bool(written and _BYTE_TOKEN.fullmatch(written))
            new += self._advance(final=False)
        return new

    def flush(self) -> str:
        """The rest, at the end of the answer: bytes that never became a character are shown as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        # A run of byte tokens is decoded as a whole, so that a wrong byte at its end spoils the good ones before.
        if self._in_bytes and not final:
            return ""
        before = self._text.decode(self._ids[self._context : self._given])
        now = self._text.decode(self._ids[self._context :])
        if len(now) <= len(before) or (now.endswith(_REPLACEMENT) and not final):
            return ""
        self._context, self._given = self._given, len(self._ids)
        return now[len(before) :]


class StopStrings:
    """Cuts growing text before the first stop string, and holds back what might be the beginning of one.

    First is the one complete first (of two that end together, the longer), so a stream is cut where the whole
    text would be.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._pending = ""
        self.stopped = False

    def first_stop(self, text: str) -> int | None:
        """Where the first stop string begins in a text, or None."""
        found = [(index + len(string), index) for string in self._strings if (index := text.find(string)) >= 0]
        return min(found)[1] if found else None

    def feed(self, text: str) -> str:
        """Text that can be shown now; nothing once `stopped`."""
        if self.stopped:
            return ""
        self._pending += text
        stop = self.first_stop(self._pending)
        if stop is not None:
            shown, self._pending, self.stopped = self._pending[:stop], "", True
            return shown
        end = len(self._pending) - self._held()
        shown, self._pending = self._pending[:end], self._pending[end:]
        return shown

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        shown, self._pending = self._pending, ""
        return shown

    def _held(self) -> int:
        """Length of the longest end of the pending text that begins a stop string."""
        longest = 0
        for string in self._strings:
            for length in range(min(len(string) - 1, len(self._pending)), longest, -1):
                if self._pending.endswith(string[:length]):
                    longest = length
                    break
        return longest
