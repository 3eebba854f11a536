"""Evaluation asks what was not trained on, and counts what was answered."""

import json
from dataclasses import replace

import pytest

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.checkpoint import load_checkpoint
from fast_dllm.cli.app import main
from fast_dllm.config import TaskItems
from fast_dllm.data.tasks import RESERVED_TEST_ITEMS, held_out_items, train_and_test
from fast_dllm.errors import FastDLLMError
from fast_dllm.evaluation import run
from fast_dllm.evaluation.benchmark import evaluate
from fast_dllm.evaluation.box import TASKS_OF_THE_BOX, seen_in_training, unseen_questions
from fast_dllm.evaluation.procedural import ProceduralBenchmark
from fast_dllm.evaluation.run import run_eval
from fast_dllm.evaluation.ways import AR, ways_to_decode
from fast_dllm.training.adapt import adapt
from fast_dllm.training.options import AdaptOptions
from samples import make_samples
from tiny import save_tiny

TASKS = "chain_sum,leg_counting"


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("causal") / "model", adapted=True, context_attention="causal")


def test_verified_answers_are_those_of_ar_and_other_models_have_none(causal, tmp_path):
    lm = BlockDiffusionLM.from_pretrained(causal)
    questions = ProceduralBenchmark(held_out_items(TASKS.split(","), 6, seed=0), max_new_tokens=12)
    outcomes = evaluate(lm, [questions], ways_to_decode(lm, [0.5]), max_batch=4)
    assert list(outcomes) == [AR, "verified 0.5", "diffusion 0.5"]
    tokens = [[s.new_tokens for s in outcomes[name].statistics] for name in (AR, "verified 0.5")]
    assert tokens[0] == tokens[1]
    assert outcomes[AR].total.tokens_per_forward == 1
    block = BlockDiffusionLM.from_pretrained(save_tiny(tmp_path / "block", adapted=True))
    assert list(ways_to_decode(block, [0.5])) == [AR, "diffusion 0.5"]
    plain = BlockDiffusionLM.from_pretrained(save_tiny(tmp_path / "plain", adapted=False))
    assert list(ways_to_decode(plain, [0.5])) == [AR]
    assert list(ways_to_decode(lm, [0.5], verify=True)) == [AR, "verified 0.5"]
    for one in (lm, block):
        assert list(ways_to_decode(one, [0.5], verify=False)) == [AR, "diffusion 0.5"]
    with pytest.raises(FastDLLMError, match="has an autoregressive answer"):
        ways_to_decode(block, [0.5], verify=True)


def test_a_full_attention_model_is_compared_with_another_model_s_answers(causal, tmp_path):
    full = save_tiny(tmp_path / "full", adapted=True, context_attention="full")
    ask = {"tasks": ["chain_sum"], "count": 3, "max_new_tokens": 6}
    with pytest.raises(FastDLLMError, match="name a baseline"):
        run_eval(full, **ask)
    assert list(run_eval(full, baseline=causal, **ask)["ways"]) == [f"AR of {causal}", "diffusion 0.9"]


def test_questions_that_the_box_was_trained_on_are_left_out():
    seen = seen_in_training()
    # Of this small task, many of the held-out questions were.
    assert any(item.question in seen for item in held_out_items(["basic_arithmetic"], 120, seed=0))
    asked = unseen_questions(["basic_arithmetic"], 60)
    assert len({item.question for item in asked} - seen) == 60


def test_questions_that_a_model_or_its_base_was_trained_on_are_left_out(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "base", adapted=False)
    options = AdaptOptions(
        steps=1, batch_size=1, max_length=64, block_size=8, lora_rank=2, eval_samples=0, probe_items=0
    )
    first, second = TaskItems(("gcd", "products"), 4000), TaskItems(("gcd",), 50)
    adapt(base, make_samples(4), options, tmp_path / "one", generated=first)
    adapt(tmp_path / "one", make_samples(4), options, tmp_path / "two", generated=second)
    adapt(tmp_path / "one", make_samples(4), replace(options, lora_rank=0), tmp_path / "whole", generated=second)
    trained, _ = train_and_test(first.tasks, first.items, RESERVED_TEST_ITEMS, seed=0)
    trained = {item.question for item in trained}
    assert trained & {item.question for item in unseen_questions(["gcd"], 200)}
    asked = []
    monkeypatch.setattr(run, "unseen_questions", lambda *given: asked.append(unseen_questions(*given)) or asked[-1][:1])
    for name in ("two", "whole"):
        assert load_checkpoint(tmp_path / name).trained_on == (first, second)
        run_eval(tmp_path / name, tasks=["gcd"], count=200, max_new_tokens=2, thresholds=[0.9])
        assert len(asked[-1]) == 200
        assert not trained & {item.question for item in asked[-1]}


def test_command_prints_and_writes_the_same_report(causal, tmp_path, capsys):
    out = tmp_path / "eval.json"
    argv = ["eval", str(causal), "--task", TASKS, "--items", "4", "--threshold", "0.9", "--max-new-tokens", "6"]
    assert main([*argv, "--out", str(out), "--against", str(causal)]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    report = json.loads(printed[-1])
    assert report == json.loads(out.read_text())
    assert list(report["ways"]) == [f"AR of {causal}", "AR", "verified 0.9", "diffusion 0.9"]
    assert set(report["ways"]["AR"]["tasks"]) == set(TASKS.split(","))
    assert report["ways"]["AR"]["over_baseline"]["value"] == 0
    assert report["ways"]["AR"]["cut_answers"] == 4  # of six tokens, by random weights
    assert {"date", "command", "machine", "max_batch"} <= report.keys()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--threshold", "high"], "must be numbers"),
        (["--task", "chess"], "task 'chess': unknown; choose from chain_sum"),
        (["--items", "4", "--task", "chain_sum", "--threshold", "2"], "threshold"),
    ],
)
def test_bad_input_is_told_in_one_line(causal, argv, message, capsys):
    assert main(["eval", str(causal), *argv]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_the_box_tasks_exist():
    assert held_out_items(TASKS_OF_THE_BOX, 4, seed=0)
