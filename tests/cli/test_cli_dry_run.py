import json
import tomllib
from pathlib import Path

import pytest
from transformers import AutoConfig

from fast_dllm.training.estimate import GIB, Devices, estimate
from fast_dllm.training.options import AdaptOptions

RECIPES = Path(__file__).parent.parent.parent / "recipes"
# Shapes of the published config.json files.
QWEN = {
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}


@pytest.mark.parametrize(("name", "tokens"), [("1.5b", 3.15e9), ("7b", 1.31e9)])
def test_the_recipes_train_what_the_paper_did(run, tmp_path, name, tokens):
    path = RECIPES / f"qwen2.5-{name}.toml"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **QWEN[name]}))
    values = tomllib.loads(path.read_text())
    options = AdaptOptions(**{key: value for key, value in values.items() if key != "model"})
    assert options.batch_size * options.accumulation * 64 == 256
    config = AutoConfig.from_pretrained(tmp_path)
    found = estimate(config, options, Devices(80 * GIB, processes=64, sharded=name == "7b"))
    assert found.tokens == pytest.approx(tokens, rel=0.01)
    flags = ["--processes", 64, "--device-memory", 80, *(["--sharded"] if name == "7b" else [])]
    common = ("adapt", "--recipe", path, "--model", tmp_path, "--data", "chats.jsonl", "--out", tmp_path / "out")
    outcome = run(*common, "--dry-run", *flags)
    assert outcome.code == 0, outcome.err
    assert f"{found.parameters / 1e6:,.1f} million" in outcome.out
    outcome = run(*common, "--dry-run", "--device-memory", 16)
    assert outcome.code == 2
    assert "does not fit" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "out.run").exists()


def test_the_memory_is_this_machines_by_default(run, plain, tmp_path):
    outcome = run("adapt", "--model", plain, "--data", "chats.jsonl", "--out", tmp_path / "out", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "500 of 8 rows of 1,024 tokens" in outcome.out


def test_a_dry_run_needs_no_data_and_its_devices_are_of_it_alone(run, plain, tmp_path):
    adapt = ("adapt", "--model", plain, "--out", tmp_path / "out", "--lora-rank", 0)
    assert run(*adapt, "--dry-run", "--processes", 2, "--sharded").code == 0
    outcome = run(*adapt, "--data", "chats.jsonl", "--processes", 2)
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert "accelerate launch" in outcome.err


def test_what_a_run_would_refuse_its_dry_run_does(run, plain, tmp_path):
    outcome = run("adapt", "--model", plain, "--out", tmp_path / "out", "--dry-run", "--processes", 2, "--sharded")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert "a LoRA adapter is not sharded" in outcome.err
