"""Every command of docs/adapt-your-own.md runs, in the page's order, with the values of its first lines."""

import json
import re
import shlex
import shutil
import string
import subprocess
from pathlib import Path

import pytest

from tiny import tiny_model
from tiny_gguf import TOKENS, write_gguf

PAGE = Path(__file__).parents[2] / "docs" / "adapt-your-own.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks():
    return BLOCK.findall(PAGE.read_text())


def given_values():
    comment = PAGE.read_text().partition("-->")[0]
    return dict(re.findall(r"([A-Z]+)=(\S+)", comment))


def commands(text):
    """The lines of a shell block, those that end in a backslash joined with the next."""
    return [line for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]


@pytest.fixture
def place(tmp_path, plain, chats, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(plain, tmp_path / "tiny")
    write_gguf(tmp_path / "tiny.gguf", tiny_model("smollm2", vocab_size=len(TOKENS)))
    (tmp_path / "prompts.txt").write_text("add 50 and 1\nadd 60 and 1\n")
    assert chats == tmp_path / "chats.jsonl"
    return tmp_path


def execute(line, variables, run):
    """Run one line: an assignment, or a fast-dllm command with or without a pipe before it."""
    if assignment := re.match(r"([A-Z]+)=", line):
        return variables.setdefault(assignment[1], None)  # not in the page's first lines: fails below
    fed, _, command = line.rpartition(" | ")
    command = string.Template(command).substitute(variables)
    stdin = subprocess.run(fed, shell=True, capture_output=True, check=True).stdout if fed else b""
    program, *argv = shlex.split(command)
    assert program == "fast-dllm", line
    outcome = run(*argv, stdin=stdin)
    assert outcome.code == 0, f"{line}\n{outcome.err}"
    return outcome


def test_every_command_of_the_page_runs(run, place):
    variables, ran = given_values(), []
    for language, text in blocks():
        if language == "python":
            exec(text, {})
        if language == "sh":
            for line in commands(text):
                execute(line, variables, run)
                ran.append(line)
    assert all(variables.values())
    said = [re.search(r"fast-dllm (\w+)", line)[1] for line in ran if "fast-dllm" in line]
    assert len(said) == PAGE.read_text().count("\nfast-dllm ") + PAGE.read_text().count("| fast-dllm ")
    assert {"info", "data", "distill", "adapt", "chat", "generate", "eval", "bench", "export"} <= set(said)
    for name in ("my-model", "my-model-blocks", "my-model-gguf", "my-model-hf"):
        assert (place / name).is_dir()
    ar, diffusion = ([json.loads(line) for line in (place / f"{mode}.jsonl").open()] for mode in ("ar", "diffusion"))
    assert {row["tokens_per_forward"] for row in ar} == {1.0}
    assert [row["prompt"] for row in ar] == [row["prompt"] for row in diffusion]


def test_the_shapes_on_the_page_are_those_that_are_read(tmp_path):
    from fast_dllm.data.sources import BadRows, Source, read_documents

    [rows] = [text for language, text in blocks() if language == "json"]
    (tmp_path / "rows.jsonl").write_text(rows)
    documents = list(read_documents(Source(source=str(tmp_path / "rows.jsonl")), BadRows()))
    assert len(documents) == 4
    assert [type(document.content) for document in documents] == [list, list, list, str]
