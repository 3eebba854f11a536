import sys

import pytest

from fast_dllm import BlockDiffusionLM
from fast_dllm.engine.engine import Engine

SHORT = ("--max-new-tokens", 12)


@pytest.fixture(scope="module")
def model(adapted):
    return BlockDiffusionLM.from_pretrained(adapted)


def conversation(model, *questions):
    """The answers to questions asked one after the other."""
    messages = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": model.chat(messages, max_new_tokens=12).text})
    return [message["content"] for message in messages[1::2]]


def test_each_line_is_a_turn_that_knows_the_earlier_ones(run, adapted, model):
    outcome = run("chat", adapted, *SHORT, stdin=b"hello\n\nand then\n")
    assert outcome.code == 0
    assert outcome.out == "".join(f"{answer}\n" for answer in conversation(model, "hello", "and then"))
    assert len(outcome.err.splitlines()) == 2
    assert all("per forward" in line and "tokens/s" in line for line in outcome.err.splitlines())


def test_reset_forgets_and_quit_leaves(run, adapted, model):
    outcome = run("chat", adapted, *SHORT, stdin=b"hello\n/reset\nhello\n/quit\nhello\n")
    (answer,) = conversation(model, "hello")
    assert outcome.out == f"{answer}\n{answer}\n"


class Terminal:
    """Someone at the keyboard: types lines, and presses Ctrl-C during chosen forwards."""

    def __init__(self, monkeypatch, typed, stop_at=()):
        lines, forwards, step = iter(typed), iter(range(1000)), Engine.step

        def read(_):
            line = next(lines, EOFError)
            if isinstance(line, type):
                raise line
            return line

        def interrupted_step(engine):
            if next(forwards) in stop_at:
                raise KeyboardInterrupt
            return step(engine)

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(Engine, "step", interrupted_step)
        monkeypatch.setattr("fast_dllm.cli.chat.sys", self)
        self.stdin = self.stdout = self
        self.stderr = sys.stderr

    def isatty(self):
        return True


def test_ctrl_c_stops_the_answer_only(run, adapted, model, monkeypatch):
    Terminal(monkeypatch, ["hello", KeyboardInterrupt, "/reset", "hello"], stop_at=[4])
    outcome = run("chat", adapted, *SHORT)
    (answer,) = conversation(model, "hello")
    assert outcome.code == 0
    shown = outcome.out.splitlines()
    assert answer.startswith(shown[0])
    assert len(shown[0]) < len(answer)
    assert shown[1] == answer


def test_a_conversation_that_is_too_long_goes_on_after_reset(run, adapted, monkeypatch):
    Terminal(monkeypatch, ["a" * 600, "hello"])
    outcome = run("chat", adapted, *SHORT)
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == 2  # the answer, and the end of the line at Ctrl-D
