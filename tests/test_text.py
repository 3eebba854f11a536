from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fast_dllm.checkpoint.checkpoint import find_stop_token_ids
from fast_dllm.errors import FastDLLMError
from fast_dllm.text import ChatText, IncrementalDetokenizer, StopStrings
from tiny import tiny_model
from tiny_tokenizers import CHATML, LLAMA3, MISTRAL, QWEN, byte_level, sentencepiece

TOKENIZERS = {"byte_level": byte_level, "sentencepiece": sentencepiece}
USER = [{"role": "user", "content": "Hello there"}]

words = st.text(alphabet=st.sampled_from("a bc\n é你🙂🙃�\u200d"), max_size=30)


def streamed(chat, chunks):
    detokenizer = chat.detokenizer()
    pieces = [detokenizer.feed(chunk) for chunk in chunks]
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(ids=st.lists(st.integers(0, 349), max_size=40))
def test_streamed_text_is_the_decoded_text_for_any_ids(name, ids):
    chat = ChatText(TOKENIZERS[name]())
    assert "".join(streamed(chat, [[token] for token in ids])) == chat.decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=words, cuts=st.lists(st.integers(0, 30)))
def test_streamed_text_does_not_depend_on_how_ids_are_grouped(name, text, cuts):
    chat = ChatText(TOKENIZERS[name]())
    ids = chat.encode(text)
    borders = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    grouped = streamed(chat, [ids[start:end] for start, end in pairwise(borders)])
    assert "".join(grouped) == chat.decode(ids)


def test_a_character_is_shown_when_its_last_byte_came():
    chat = ChatText(byte_level())
    ids = chat.encode("tiger \U0001fae0")
    detokenizer = chat.detokenizer()
    before = "".join(detokenizer.feed([token]) for token in ids[:-1])
    assert before.rstrip() == "tiger"
    assert before + detokenizer.feed(ids[-1:]) == "tiger \U0001fae0"
    assert detokenizer.flush() == ""


def test_sentencepiece_bytes_are_shown_when_their_run_ends():
    chat = ChatText(sentencepiece())
    detokenizer = chat.detokenizer()
    shown = detokenizer.feed(chat.encode("tiger \U0001fae0"))
    assert shown.rstrip() == "tiger"
    assert shown + detokenizer.feed(chat.encode("tiger")).rstrip() == "tiger \U0001fae0 tiger"


def test_bytes_that_never_became_a_character_are_shown_at_the_end():
    chat = ChatText(byte_level())
    [first, *_] = chat.encode("\U0001fae0")
    detokenizer = chat.detokenizer()
    assert detokenizer.feed([first]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_not_shown():
    tokenizer = byte_level()
    chat = ChatText(tokenizer)
    detokenizer = IncrementalDetokenizer(chat)
    ids = chat.encode("<|im_start|>Hello<|im_end|> there")
    assert detokenizer.feed(ids) + detokenizer.flush() == "Hello there"


@pytest.mark.parametrize("template", [CHATML, QWEN, LLAMA3, MISTRAL])
def test_the_prompt_is_the_chat_template_up_to_the_answer(template):
    tokenizer = byte_level(template)
    expected = tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_dict=False)
    assert ChatText(tokenizer).prompt_ids(USER) == expected


@pytest.mark.parametrize("template", [CHATML, QWEN, LLAMA3, MISTRAL, None])
def test_stop_ids_are_end_of_text_and_end_of_turn(template):
    tokenizer = byte_level(template)
    names = {CHATML: ["<|im_end|>"], QWEN: ["<|im_end|>"], LLAMA3: ["<|eot_id|>"]}.get(template, [])
    expected = tokenizer.convert_tokens_to_ids(["</s>", *names])
    model = tiny_model("llama", vocab_size=len(tokenizer), eos_token_id=None)
    assert find_stop_token_ids(model, tokenizer) == tuple(expected)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "messages is empty"),
        ({"role": "user", "content": "x"}, "messages must be a list"),
        ([{"role": "user", "content": 3}], "message 1: content is int, not a string"),
        ([*USER, {"content": "x"}], 'message 2 has no "role"'),
    ],
)
def test_malformed_messages_are_named(messages, error):
    with pytest.raises(FastDLLMError, match=error):
        ChatText(byte_level()).prompt_ids(messages)


def test_a_tokenizer_without_chat_template_is_refused():
    with pytest.raises(FastDLLMError, match="no chat template"):
        ChatText(byte_level(None)).prompt_ids(USER)


stops = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


def cut_stream(strings, chunks):
    stopper = StopStrings(strings)
    return "".join([*map(stopper.feed, chunks), stopper.flush()]), stopper.stopped


@given(stops, st.text("abc", max_size=20), st.lists(st.integers(0, 20)))
def test_a_stream_is_cut_where_the_whole_text_is(strings, text, cuts):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown, stopped = cut_stream(strings, [text[start:end] for start, end in pairwise(borders)])
    first = StopStrings(strings).first_stop(text)
    assert shown == text[:first]
    assert stopped == (first is not None)


@given(stops, st.text("abc", max_size=20))
def test_shown_text_holds_no_stop_string(strings, text):
    shown, _ = cut_stream(strings, list(text))
    assert all(string not in shown for string in strings)


@given(stops, st.text("abc", max_size=20))
def test_no_more_is_held_back_than_might_begin_a_stop_string(strings, text):
    stopper = StopStrings(strings)
    shown = stopper.feed(text)
    if not stopper.stopped:
        held = text[len(shown) :]
        assert not held or any(string.startswith(held) for string in strings)


def test_nothing_is_shown_after_a_stop():
    stopper = StopStrings(["END"])
    assert stopper.feed("abc EN") == "abc "
    assert stopper.feed("D def") == ""
    assert stopper.stopped
    assert stopper.feed("more") == ""
    assert stopper.flush() == ""


def test_without_stop_strings_everything_is_shown_at_once():
    stopper = StopStrings(())
    assert stopper.feed("abc") == "abc"
    assert stopper.first_stop("abc") is None


def test_of_two_that_end_together_the_longer_counts():
    assert StopStrings(["b", "ab"]).first_stop("xab") == 1
