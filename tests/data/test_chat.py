import itertools

import pytest

from fast_dllm.data import chat
from fast_dllm.data.chat import render_chat, render_text
from fast_dllm.errors import FastDLLMError
from fast_dllm.text import ChatText
from tiny_tokenizers import (
    CHATML,
    DROPS_THINKING,
    END_OF_TURN,
    LLAMA3,
    MARKED_TEXT,
    MARKED_TURN,
    MISTRAL,
    TEMPLATES,
    byte_level,
    sentencepiece,
)

TWO_TURNS = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "five, of course"},
    {"role": "user", "content": "And naïve 🙂?"},
    {"role": "assistant", "content": "café 🙃 你好"},
]


def learned_runs(tokenizer, sample):
    """The text of every run of loss positions, special tokens included."""
    runs, current = [], []
    for token, loss in zip([*sample.input_ids, None], [*sample.loss_mask, False]):
        if loss:
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


def expected_run(name, content):
    end = END_OF_TURN.get(name, "<|im_end|>\n")
    return f" {content}{end}" if name == "mistral" else f"{content}{end}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_loss_is_exactly_the_assistants_turns(name):
    tokenizer = byte_level(TEMPLATES[name])
    runs = learned_runs(tokenizer, render_chat(tokenizer, TWO_TURNS))
    assert runs == [expected_run(name, "five, of course"), expected_run(name, "café 🙃 你好")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_the_chat_template(name):
    tokenizer = byte_level(TEMPLATES[name])
    sample = render_chat(tokenizer, TWO_TURNS)
    assert sample.input_ids == tokenizer.apply_chat_template(TWO_TURNS, return_dict=False)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "mistral"])
def test_tokens_before_the_last_answer_are_the_prompt_of_decoding(name):
    tokenizer = byte_level(TEMPLATES[name])
    sample = render_chat(tokenizer, TWO_TURNS)
    prompt = ChatText(tokenizer).prompt_ids(TWO_TURNS[:-1])
    assert sample.input_ids[: len(prompt)] == prompt
    assert all(sample.loss_mask[len(prompt) :])
    assert not sample.loss_mask[len(prompt) - 1]


@pytest.mark.parametrize("content", ["    return value", "\n\n  x", "a\n    ", "", "12", "assistant\n"])
@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, MARKED_TEXT, MARKED_TURN])
def test_spaces_at_the_edges_of_an_answer_are_learned(template, content):
    tokenizer = byte_level(template)
    turns = [TWO_TURNS[0], {"role": "assistant", "content": content}]
    kept = content.strip() if template == LLAMA3 else content
    [run] = learned_runs(tokenizer, render_chat(tokenizer, turns))
    # In front, the template's own whitespace may have merged with the answer's.
    text, end, newline = run.rpartition("<")[0], run.rpartition("<")[2].rstrip("\n"), run.endswith("\n")
    assert text.endswith(kept)
    assert text.removesuffix(kept).strip() == ""
    assert end in ("|im_end|>", "|eot_id|>", "/s>")
    assert newline == (end == "|im_end|>")


def test_sentencepiece_style_tokenizer_marks_the_answer_and_its_end():
    tokenizer = sentencepiece()
    sample = render_chat(tokenizer, TWO_TURNS)
    runs = learned_runs(tokenizer, sample)
    assert [run.strip() for run in runs] == ["five, of course</s>", "café 🙃 你好</s>"]


def test_system_and_user_turns_carry_no_loss():
    tokenizer = byte_level()
    sample = render_chat(tokenizer, [{"role": "system", "content": "Be five."}, *TWO_TURNS])
    text = "".join(learned_runs(tokenizer, sample))
    assert "Be" not in text
    assert "What" not in text


def test_truncation_cuts_the_end_and_is_reported():
    tokenizer = byte_level()
    whole = render_chat(tokenizer, TWO_TURNS)
    assert not whole.truncated
    cut = render_chat(tokenizer, TWO_TURNS, max_length=20)
    assert cut.truncated
    assert cut.input_ids == whole.input_ids[:20]
    assert cut.loss_mask == whole.loss_mask[:20]
    assert render_chat(tokenizer, TWO_TURNS, max_length=len(whole.input_ids)) == whole


def test_lost_ends_of_turns_are_counted():
    tokenizer = byte_level()
    whole = render_chat(tokenizer, TWO_TURNS)
    ends = [i for i, (a, b) in enumerate(zip(whole.loss_mask, [*whole.loss_mask[1:], False])) if a and not b]
    assert len(ends) == 2
    for length in range(1, len(whole.input_ids) + 1):
        cut = render_chat(tokenizer, TWO_TURNS, max_length=length)
        assert cut.lost_ends == sum(end >= length for end in ends)


def test_plain_text_is_learned_but_for_its_first_token_and_ends():
    tokenizer = byte_level()
    [sample] = render_text(tokenizer, "Hello there")
    assert sample.loss_mask == [False] + [True] * (len(sample.input_ids) - 1)
    assert tokenizer.decode(sample.input_ids) == "Hello there</s>"
    assert not sample.truncated


@pytest.mark.parametrize("length", [2, 3, 5, 100])
def test_windows_of_a_long_text_learn_each_token_once(length):
    tokenizer = byte_level()
    [whole] = render_text(tokenizer, "Hello there, tell me a story about a tiger and the sea.")
    windows = render_text(tokenizer, "Hello there, tell me a story about a tiger and the sea.", max_length=length)
    learned = [token for window in windows for token, loss in zip(window.input_ids, window.loss_mask) if loss]
    assert learned == whole.input_ids[1:]
    assert all(2 <= len(window.input_ids) <= length for window in windows)
    for before, after in itertools.pairwise(windows):
        assert before.input_ids[-1] == after.input_ids[0]


def test_a_text_without_tokens_has_no_loss_position():
    tokenizer = byte_level()
    assert [sample.loss_mask for sample in render_text(tokenizer, "")] == [[False]]
    tokenizer.eos_token = None
    assert [sample.input_ids for sample in render_text(tokenizer, "")] == [[]]


def test_a_template_that_rewrites_earlier_turns_is_followed():
    tokenizer = byte_level(DROPS_THINKING)
    runs = learned_runs(tokenizer, render_chat(tokenizer, TWO_TURNS))
    assert runs == ["five, of course<|im_end|>\n", "<think>\n\n</think>\n\ncafé 🙃 你好<|im_end|>\n"]


CLOSES_THE_LAST_TURN_DIFFERENTLY = CHATML.replace(
    "'<|im_end|>' + '\n' }}",
    "}}{% if loop.last and m['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ '<|im_end|>\n' }}{% endif %}",
).replace("m['content'] + }}", "m['content'] }}")


def test_a_template_that_closes_earlier_turns_differently_is_refused_with_the_remedy():
    tokenizer = byte_level(CLOSES_THE_LAST_TURN_DIFFERENTLY)
    with pytest.raises(FastDLLMError, match=r"message 2: .*differently.*generation"):
        render_chat(tokenizer, TWO_TURNS)
    assert learned_runs(tokenizer, render_chat(tokenizer, TWO_TURNS[:2])) == ["five, of course</s>"]


def test_content_that_holds_the_marker_is_refused_not_mistaken():
    tokenizer = byte_level(DROPS_THINKING)
    turns = [*TWO_TURNS[:2], {"role": "user", "content": chat._MARKER}, TWO_TURNS[3]]
    with pytest.raises(FastDLLMError, match="message 2: "):
        render_chat(tokenizer, turns)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "messages is empty"),
        ("hello", "messages must be a list"),
        ([{"role": "user"}], 'message 1 has no "content"'),
        ([{"role": "bot", "content": "x"}], "message 1: role 'bot' is unknown"),
        ([{"role": "user", "content": None}], "message 1: content is NoneType, not a string"),
        ([TWO_TURNS[0], 7], "message 2 is not an object"),
        ([TWO_TURNS[0]], "no assistant turn"),
        ([TWO_TURNS[1]], "message 1 is the assistant's"),
    ],
)
def test_malformed_conversations_are_named(messages, error):
    with pytest.raises(FastDLLMError, match=error):
        render_chat(byte_level(), messages)


def test_a_refusal_of_the_template_is_passed_on():
    with pytest.raises(FastDLLMError, match="roles must alternate"):
        render_chat(byte_level(MISTRAL), [TWO_TURNS[0], *TWO_TURNS])


def test_a_tokenizer_without_chat_template_is_refused():
    with pytest.raises(FastDLLMError, match="no chat template"):
        render_chat(byte_level(None), TWO_TURNS)
