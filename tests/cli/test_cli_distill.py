import json
import signal
import subprocess
import sys
import time

import pytest

FLAGS = ("--max-new-tokens", 60, "--temperature", 1, "--batch-size", 2)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"question {n}\n" for n in range(40)))
    return path


def test_prompts_become_chats(run, plain, prompts, tmp_path):
    out = tmp_path / "chats.jsonl"
    outcome = run("distill", plain, "--prompts", prompts, "--out", out, *FLAGS)
    assert (outcome.code, outcome.err) == (0, "")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert 0 < len(rows) < 40
    assert f"kept        {len(rows)} of 40 conversations" in outcome.out
    assert all([message["role"] for message in row["messages"]] == ["user", "assistant"] for row in rows)


def test_a_killed_run_goes_on_where_it_was(run, plain, prompts, tmp_path):
    out, whole = tmp_path / "chats.jsonl", tmp_path / "whole.jsonl"
    part = tmp_path / "chats.jsonl.part"
    command = ["distill", str(plain), "--prompts", str(prompts), "--out", str(out), *map(str, FLAGS)]
    process = subprocess.Popen(
        [sys.executable, "-c", f"from fast_dllm.cli import main; main({command!r})"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not (part.exists() and part.read_bytes().count(b"\n") > 5):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    answered = part.read_bytes().count(b"\n") - 1
    assert 5 <= answered < 40
    assert not out.exists()
    assert run(*command).code == 0
    assert run("distill", plain, "--prompts", prompts, "--out", whole, *FLAGS).code == 0
    assert out.read_text() == whole.read_text()


def test_ctrl_c_says_how_to_go_on(run, plain, prompts, tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    out = tmp_path / "chats.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("fast_dllm.engine.engine.Engine.step", interrupt)
        outcome = run("distill", plain, "--prompts", prompts, "--out", out, *FLAGS)
    assert (outcome.code, outcome.err) == (130, "stopped; the same command goes on where it was\n")
    assert run("distill", plain, "--prompts", prompts, "--out", out, *FLAGS).code == 0


def test_answers_at_the_end_of_conversations_are_replaced(run, plain, chats, tmp_path):
    out = tmp_path / "own.jsonl"
    assert run("distill", plain, "--prompts", chats, "--out", out, *FLAGS).code == 0
    asked = [json.loads(line)["messages"][0] for line in chats.read_text().splitlines()]
    rows = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    assert rows
    assert all(row[0] in asked and len(row) == 2 for row in rows)


def test_conversations_of_parquet_are_answered_turn_by_turn(run, plain, chats, tmp_path):
    datasets = pytest.importorskip("datasets")
    asked = [json.loads(line)["messages"] for line in chats.read_text().splitlines()]
    twice = [{"messages": [*messages, *messages], "id": n} for n, messages in enumerate(asked)]
    path, out = tmp_path / "chats.parquet", tmp_path / "own.jsonl"
    datasets.Dataset.from_list(twice).to_parquet(str(path))
    outcome = run("distill", plain, "--prompts", path, "--out", out, *FLAGS)
    assert outcome.code == 0, outcome.err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {len(row["messages"]) for row in rows} == {2, 4}
    theirs = {messages[1]["content"] for messages in asked}
    for row in rows:
        assert row["messages"][0] == row["messages"][-2] == asked[row["id"]][0]
        assert not theirs & {message["content"] for message in row["messages"]}


def test_bad_rows_are_told_or_skipped(run, plain, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "chats.jsonl"
    rows = ['{"prompt": "one"}', "{broken", json.dumps({"prompt": "a" * 600}), '{"prompt": "two"}']
    file.write_text("\n".join(rows))
    command = ("distill", plain, "--prompts", file, "--out", out, *FLAGS)
    outcome = run(*command)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {file}:2: not JSON")
    outcome = run(*command, "--skip-bad-rows")
    assert outcome.code == 0
    assert "skipped     1 bad rows, 1 prompts too long for the model" in outcome.out
