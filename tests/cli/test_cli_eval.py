"""`fast-dllm eval` on benchmarks of lm-evaluation-harness."""

import json
import sys

import pytest

from benchmark_files import LIMIT, gsm8k_file, ifeval_file, write_rows
from fast_dllm.api import BlockDiffusionLM
from fast_dllm.evaluation import harness_tasks
from tiny import save_tiny


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("causal") / "model", adapted=True, context_attention="causal")


def test_one_report_for_procedural_tasks_and_benchmarks(run, causal, tmp_path):
    gsm8k = gsm8k_file(tmp_path / "gsm8k.jsonl", BlockDiffusionLM.from_pretrained(causal))
    ifeval = ifeval_file(tmp_path / "ifeval.jsonl")
    out = tmp_path / "eval.json"
    outcome = run(
        *("eval", causal, "--task", "gsm8k,chain_sum,ifeval", "--items", 3, "--few-shot", 0, "--threshold", 0.5),
        *("--benchmark-data", f"gsm8k={gsm8k}", "--benchmark-data", f"ifeval={ifeval}"),
        *("--max-new-tokens", LIMIT, "--against", causal, "--out", out),
    )
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads(outcome.out.splitlines()[-1])
    assert report == json.loads(out.read_text())
    assert report["questions"] == 9
    assert list(report["ways"]) == [f"AR of {causal}", "AR", "verified 0.5", "diffusion 0.5"]
    for name in ("AR", "verified 0.5"):
        way = report["ways"][name]
        tasks = way["tasks"]
        assert list(tasks) == ["chain_sum", "gsm8k", "ifeval"]
        assert [task["questions"] for task in tasks.values()] == [3, 3, 3]
        assert [tasks[task]["accuracy"]["value"] for task in ("gsm8k", "ifeval")] == [1 / 3, 2 / 3]
        assert tasks["gsm8k"]["over_baseline"] == pytest.approx({"value": 0, "low": -0.554, "high": 0.554}, abs=1e-3)
        assert way["new_tokens"] == sum(task["new_tokens"] for task in tasks.values())
        assert tasks["ifeval"]["metrics"]["inst_level_loose_acc,none"] == 2 / 3
    itself = report["ways"][f"AR of {causal}"]["tasks"]["gsm8k"]
    assert itself["over_baseline"] == {"value": 0, "low": 0, "high": 0}
    assert report["settings"]["gsm8k"]["few_shot"] == 0
    assert "gsm8k, 3 questions" in outcome.out


# What follows "eval MODEL", with a file of rows in place of FILE; and what the line must say.
BAD = {
    "missing file": (["--task", "gsm8k", "--benchmark-data", "gsm8k=nowhere"], [], "nowhere: no such file"),
    "file of another benchmark": (
        ["--task", "gsm8k", "--benchmark-data", "gsm8k=FILE"],
        [{"prompt": "a"}],
        "'question' is undefined",
    ),
    "empty file": (["--task", "gsm8k", "--benchmark-data", "gsm8k=FILE"], [], "has no questions"),
    "no network": (["--task", "gsm8k"], [], "without a network, give --benchmark-data gsm8k=FILE"),
    "no examples": (
        ["--task", "gsm8k", "--benchmark-data", "gsm8k=FILE"],
        [{"question": "a", "answer": "#### 1"}],
        "shows 5 examples, and 0 are given; give --benchmark-data gsm8k:few-shot=FILE, or --few-shot 0",
    ),
    "too few examples": (
        ["--task", "gsm8k", "--benchmark-data", "gsm8k=FILE", "--benchmark-data", "gsm8k:few-shot=FILE"],
        [{"question": "a", "answer": "#### 1"}],
        "shows 5 examples, and 1 are given",
    ),
    "examples without questions": (
        ["--task", "gsm8k", "--benchmark-data", "gsm8k:few-shot=FILE"],
        [{"question": "a", "answer": "#### 1"}],
        "its questions are missing",
    ),
    "data of no task": (["--task", "gsm8k", "--benchmark-data", "ifeval=FILE"], [], "must be a benchmark of --task"),
    "data without a benchmark": (["--benchmark-data", "ifeval=FILE"], [], "must be a benchmark of --task"),
    "data without a name": (["--benchmark-data", "FILE"], [], "must be NAME=FILE"),
    "no task": (["--task", ","], [], "no tasks given"),
    "likelihoods beside answers": (
        ["--task", "piqa,chain_sum", "--items", "2", "--benchmark-data", "piqa=FILE"],
        [{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}],
        "piqa: compares likelihoods and decodes nothing",
    ),
    "negative examples": (["--few-shot", "-1"], [], "--few-shot"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_line(run, causal, tmp_path, name):
    argv, rows, message = BAD[name]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    outcome = run("eval", causal, *(argument.replace("FILE", file) for argument in argv))
    assert outcome.code == 2
    assert message.replace("FILE", file) in outcome.err.replace("FILE", file)
    assert len(outcome.err.splitlines()) == 1


def test_a_broken_line_is_named(run, causal, tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"question": "a", "answer": "#### 1"}\n{"question": \n')
    outcome = run("eval", causal, "--task", "gsm8k", "--benchmark-data", f"gsm8k={path}")
    assert (outcome.code, outcome.out) == (2, "")
    assert f"{path}:2: not JSON" in outcome.err


def test_missing_lm_eval_is_told_with_its_remedy(run, causal, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    harness_tasks._index.cache_clear()
    outcome = run("eval", causal, "--task", "gsm8k")
    assert outcome.code == 2
    assert "run pip install '.[eval]'" in outcome.err
    assert len(outcome.err.splitlines()) == 1
