"""The Python of the README and of docs/training.md runs as it stands, with a tiny model in place of the real one."""

import json
import re
from pathlib import Path

import pytest

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import DecodingConfig
from fast_dllm.text import ChatText
from tiny import save_tiny

ROOT = Path(__file__).parents[1]
BOX = 'BlockDiffusionLM.from_pretrained("smollm2", dtype="int8")'


def python_blocks(page, heading):
    """The code of a page between a heading and the next one of its rank or above."""
    text = (ROOT / page).read_text().partition(f"\n{heading}\n")[2]
    text = re.split(rf"^#{{1,{heading.index(' ')}}} ", text, maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert blocks, f"{page} has no code under {heading}"
    return blocks


@pytest.fixture
def model(tmp_path):
    return save_tiny(tmp_path / "model", adapted=True, context_attention="causal", max_position_embeddings=1024)


def run(blocks, model):
    """Run blocks one after another, and give what they leave."""
    code = "\n".join(blocks)
    assert code.count(BOX) == 1
    names = {}
    exec(code.replace(BOX, f"BlockDiffusionLM.from_pretrained({model!r})"), names)
    return names


def asked():
    return [[{"role": "user", "content": f"What is {n} + 25 - 8?"}] for n in range(17, 20)]


def test_the_readme_decodes_as_it_says(model, capsys):
    names = run(python_blocks("README.md", "## Use it"), model)
    lm = names["model"]
    reply, question = names["reply"], names["messages"]
    assert reply.text == lm.chat(question).text == lm.chat(question, mode="ar").text
    sampled = next(lm.answers([question], DecodingConfig(temperature=0.5, seed=1)))
    assert capsys.readouterr().out == f"{reply.text} {reply.statistics.tokens_per_forward}\n{sampled.text}"
    assert names["chats"] == asked()
    several = [lm.chat(chat, max_new_tokens=200) for chat in asked()]
    assert [one.ids for one in names["replies"]] == [one.ids for one in several]
    prompts = [ChatText(lm.tokenizer).prompt_ids(chat) for chat in asked()]
    assert names["ids"] == [*prompts[0], *several[0].ids]
    result = names["result"]
    assert [answer[:200] for answer in result.answers] == [one.ids for one in several]
    assert [len(answer) for answer in result.answers] == [one.new_tokens for one in result.statistics]


def test_the_readme_serves_several_at_once(model, capsys):
    run([code for code in python_blocks("README.md", "## What it does") if "AsyncEngine" in code], model)
    lm = BlockDiffusionLM.from_pretrained(model)
    expected = [reply.text for reply in lm.answers(asked(), DecodingConfig(max_new_tokens=200))]
    assert capsys.readouterr().out == f"{expected}\n"


def test_training_from_python_gives_a_model_that_drafts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = save_tiny(tmp_path / "base", adapted=False)
    chats = [[*asked()[0], {"role": "assistant", "content": f"it is {n}."}] for n in range(40)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    [code] = python_blocks("docs/training.md", "## From Python")
    for theirs, ours in (('"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(base)), ("steps=500", "steps=2")):
        assert code.count(theirs) == 1
        code = code.replace(theirs, ours)
    names = {}
    exec(code, names)
    result = names["result"]
    assert capsys.readouterr().out == f"{result.loss_before} {result.loss_after} {result.directory}\n"
    assert (result.steps, len(names["data"].samples), len(names["data"].held_out)) == (2, 38, 2)
    adapted, before = BlockDiffusionLM.from_pretrained(tmp_path / "drafts"), BlockDiffusionLM.from_pretrained(base)
    assert adapted.config.block_size == 8
    assert adapted.chat(asked()[1], max_new_tokens=40).ids == before.chat(asked()[1], 40, mode="ar").ids
