"""Loss positions under the chat templates of published models, against texts written out by hand."""

from pathlib import Path

import pytest

from fast_dllm.data.chat import render_chat
from fast_dllm.text import ChatText
from tiny_tokenizers import CHATML, byte_level

TEMPLATES = Path(__file__).parent.parent / "chat_templates"

SYSTEM = {"role": "system", "content": "Be five."}
FIRST = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "five, of course"}]
SECOND = [{"role": "user", "content": "And naïve 🙂?"}, {"role": "assistant", "content": "café 🙃 你好"}]
THOUGHT = [FIRST[0], {"role": "assistant", "content": "<think>\nthree and two\n</think>\n\nfive"}]

QWEN_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def chatml(*turns, opening=""):
    """Whole text with what is learned between ⟦ ⟧; a turn is (question, what follows the generation prompt)."""
    return opening + "".join(
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n⟦{answer}<|im_end|>\n⟧"
        for question, answer in turns
    )


def llama3(*turns, opening="<s>"):
    def head(role):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    return opening + "".join(
        f"{head('user')}{question}<|eot_id|>{head('assistant')}⟦{answer}<|eot_id|>⟧" for question, answer in turns
    )


QA1, QA2 = ("What is 2 + 3?", "five, of course"), ("And naïve 🙂?", "café 🙃 你好")
SYSTEM_TURN = "<|im_start|>system\nBe five.<|im_end|>\n"
LLAMA_SYSTEM = "<s><|start_header_id|>system<|end_header_id|>\n\nBe five.<|eot_id|>"

# (template, messages, text with learned parts between brackets)
CASES = {
    "chatml": ("chatml", FIRST + SECOND, chatml(QA1, QA2)),
    "chatml, system": ("chatml", [SYSTEM, *FIRST], chatml(QA1, opening=SYSTEM_TURN)),
    "llama3": ("llama3", FIRST + SECOND, llama3(QA1, QA2)),
    "llama3, system": ("llama3", [SYSTEM, *FIRST, *SECOND], llama3(QA1, QA2, opening=LLAMA_SYSTEM)),
    "llama3 with generation marks": (
        "llama3_marked",
        [SYSTEM, *FIRST, *SECOND],
        llama3(QA1, QA2, opening=LLAMA_SYSTEM),
    ),
    "mistral v0.2": (
        "mistral_v0_2",
        FIRST + SECOND,
        "<s>[INST] What is 2 + 3? [/INST]⟦five, of course</s>⟧[INST] And naïve 🙂? [/INST]⟦café 🙃 你好</s>⟧",
    ),
    "mistral v0.3": (
        "mistral_v0_3",
        FIRST + SECOND,
        "<s>[INST] What is 2 + 3?[/INST]⟦ five, of course</s>⟧[INST] And naïve 🙂?[/INST]⟦ café 🙃 你好</s>⟧",
    ),
    # It writes the system message into the last user turn, and only where no answer follows it.
    "mistral v0.3, system": (
        "mistral_v0_3",
        [SYSTEM, *FIRST, *SECOND],
        "<s>[INST] What is 2 + 3?[/INST]⟦ five, of course</s>⟧[INST] And naïve 🙂?[/INST]⟦ café 🙃 你好</s>⟧",
    ),
    "qwen2.5": ("qwen2_5", FIRST + SECOND, chatml(QA1, QA2, opening=QWEN_SYSTEM)),
    "qwen2.5, system": ("qwen2_5", [SYSTEM, *FIRST, *SECOND], chatml(QA1, QA2, opening=SYSTEM_TURN)),
    # Qwen3 writes a thought, if only an empty one, into the last answer alone.
    "qwen3, one turn": ("qwen3", FIRST, chatml((QA1[0], EMPTY_THOUGHT + QA1[1]))),
    "qwen3": ("qwen3", FIRST + SECOND, chatml(QA1, (QA2[0], EMPTY_THOUGHT + QA2[1]))),
    "qwen3, system": (
        "qwen3",
        [SYSTEM, *FIRST, *SECOND, *FIRST],
        chatml(QA1, QA2, (QA1[0], EMPTY_THOUGHT + QA1[1]), opening=SYSTEM_TURN),
    ),
    "qwen3, a thought": (
        "qwen3",
        THOUGHT,
        chatml((QA1[0], "<think>\nthree and two\n</think>\n\nfive")),
    ),
    "qwen3, a thought is dropped when the conversation goes on": (
        "qwen3",
        THOUGHT + SECOND,
        chatml((QA1[0], "five"), (QA2[0], EMPTY_THOUGHT + QA2[1])),
    ),
    "qwen3, the same answer twice": (
        "qwen3",
        FIRST + FIRST,
        chatml(QA1, (QA1[0], EMPTY_THOUGHT + QA1[1])),
    ),
}


def tokenizer_of(name):
    return byte_level(CHATML if name == "chatml" else (TEMPLATES / f"{name}.jinja").read_text())


def bracketed(tokenizer, sample):
    """The sample's text with its loss positions between ⟦ ⟧."""
    runs, inside = [[]], False
    for token, loss in zip(sample.input_ids, sample.loss_mask):
        if loss != inside:
            runs.append([])
            inside = loss
        runs[-1].append(token)
    texts = [tokenizer.decode(run) for run in runs]
    return "".join(f"⟦{text}⟧" if index % 2 else text for index, text in enumerate(texts))


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_answers_are_learned(case):
    name, messages, expected = CASES[case]
    tokenizer = tokenizer_of(name)
    assert bracketed(tokenizer, render_chat(tokenizer, messages)) == expected


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_the_chat_template(case):
    name, messages, _ = CASES[case]
    tokenizer = tokenizer_of(name)
    sample = render_chat(tokenizer, messages)
    assert sample.input_ids == tokenizer.apply_chat_template(messages, return_dict=False)


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama3_marked", "mistral_v0_2", "qwen2_5", "qwen3"])
def test_what_is_not_learned_before_the_last_answer_is_the_prompt_of_decoding(name):
    tokenizer = tokenizer_of(name)
    sample = render_chat(tokenizer, FIRST + SECOND)
    prompt = ChatText(tokenizer).prompt_ids((FIRST + SECOND)[:-1])
    assert sample.input_ids[: len(prompt)] == prompt
    assert all(sample.loss_mask[len(prompt) :])
