import json
import re
import shutil

import pytest
from transformers import Trainer

from fast_dllm.training.callbacks import ProgressLines

FAST = ("--batch-size", 2, "--max-length", 64, "--block-size", 8, "--lora-rank", 2, "--eval-samples", 2)


def log(out):
    return [
        json.loads(line) for line in out.with_name(f"{out.name}.run").joinpath("log.jsonl").read_text().splitlines()
    ]


def test_adapted_model_decodes_in_blocks(run, plain, chats, tmp_path):
    out = tmp_path / "adapted"
    outcome = run("adapt", "--model", plain, "--data", chats, "--out", out, "--steps", 3, *FAST)
    assert outcome.code == 0, outcome.err
    assert all(line.startswith("step ") for line in outcome.err.splitlines())  # no warnings
    for said in ("38, 2 held out", "held-out loss", "3 of 3", str(out), f"fast-dllm chat {out}"):
        assert said in outcome.out
    (row,) = run("generate", out, "--prompt", "add 2 and 1", "--max-new-tokens", 16, "--threshold", 0).rows()
    assert row["tokens_per_forward"] > 1
    facts = json.loads(run("info", out, "--json").out)
    assert (facts["block_size"], facts["base"]) == (8, str(plain))


@pytest.mark.parametrize(("seconds_between_lines", "told"), [(60.0, [1]), (0.0, [1, 2, 3])])
def test_a_log_file_gets_lines_instead_of_a_bar(run, plain, chats, tmp_path, monkeypatch, seconds_between_lines, told):
    monkeypatch.setattr(ProgressLines, "_PAUSE", seconds_between_lines)
    out = tmp_path / "adapted"
    outcome = run("adapt", "--model", plain, "--data", chats, "--out", out, "--steps", 3, "--eval-every", 2, *FAST)
    assert outcome.code == 0, outcome.err
    step = r"step (\d) of 3: loss \d\.\d{3}, \d+ tokens/s, 0:00:\d\d left"
    assert [int(found) for found in re.findall(f"^{step}$", outcome.err, re.MULTILINE)] == told
    measured = re.findall(r"^step (\d): held-out loss .+$", outcome.err, re.MULTILINE)
    assert measured == ["0", "2", "3"]
    assert len(outcome.err.splitlines()) == len(told) + 3


def test_the_same_command_resumes_an_interrupted_run(run, plain, chats, tmp_path, monkeypatch):
    out = tmp_path / "adapted"
    command = ("adapt", "--model", plain, "--data", chats, "--out", out, "--steps", 3, "--save-every", 1, *FAST)
    step, calls = Trainer.training_step, iter(range(9))

    def interrupted(*args, **kwargs):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        outcome = run(*command)
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1] == "stopped; the same command goes on from the last save"
    assert not out.exists()
    outcome = run(*command)
    assert outcome.code == 0
    assert "3 of 3" in outcome.out
    assert [line["step"] for line in log(out) if "loss" in line] == [1, 2, 3]


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_options_win_over_the_recipe(run, plain, chats, tmp_path, suffix):
    recipe, out = tmp_path / f"recipe.{suffix}", tmp_path / "adapted"
    values = {"model": str(plain), "tasks": ["nothing"], "steps": 9, "batch_size": 2, "max_length": 64}
    values |= {"block_size": 8, "lora_rank": 2, "complementary": False}
    if suffix == "json":
        recipe.write_text(json.dumps(values))
    else:
        recipe.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    flags = ("--steps", 1, "--data", chats, "--complementary")
    outcome = run("adapt", "--recipe", recipe, "--out", out, *flags)
    assert outcome.code == 0, outcome.err
    saved = json.loads((tmp_path / "adapted.run" / "options.json").read_text())
    assert (saved["steps"], saved["batch_size"], saved["complementary"]) == (1, 2, True)


def test_tasks_are_made_and_held_out(run, plain, tmp_path):
    pytest.importorskip("reasoning_gym")
    flags = ("--task", "chain_sum,leg_counting", "--task-items", 6, "--steps", 1)
    outcome = run("adapt", "--model", plain, "--out", tmp_path / "adapted", *flags, *FAST, "--max-length", 256)
    assert outcome.code == 0, outcome.err
    assert "6, 2 held out" in outcome.out
    assert all("eval_right" in line for line in log(tmp_path / "adapted") if "eval_loss" in line)


def test_samples_that_are_too_long_are_told(run, plain, chats, tmp_path):
    with chats.open("a") as file:
        turns = [{"role": "user", "content": "a" * 80}, {"role": "assistant", "content": "b"}]
        file.write(json.dumps({"messages": turns}) + "\n")
    flags = ("--steps", 1, *FAST, "--eval-samples", 0)
    outcome = run("adapt", "--model", plain, "--data", chats, "--out", tmp_path / "adapted", *flags)
    assert "1 cut to --max-length 64; end-of-turn tokens lost by that: 1; 1 dropped" in outcome.out


def test_an_adapter_over_a_base_that_has_moved_is_trained_on(run, plain, chats, tmp_path):
    base, first = tmp_path / "base", tmp_path / "first"
    shutil.copytree(plain, base)
    command = ("adapt", "--data", chats, "--steps", 1, *FAST)
    assert run(*command, "--model", base, "--out", first).code == 0
    for file in (*first.glob("tokenizer*"), *first.glob("chat_template*")):
        file.unlink()
    moved = base.rename(tmp_path / "moved")
    assert run(*command, "--model", first, "--out", tmp_path / "second").code == 2
    outcome = run(*command, "--model", first, "--base", moved, "--out", tmp_path / "second")
    assert outcome.code == 0, outcome.err
