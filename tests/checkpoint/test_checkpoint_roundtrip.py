"""What is saved comes back the same: whole models, of every architecture, and their settings."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fast_dllm.checkpoint import AUTOREGRESSIVE, Checkpoint, add_mask_token, load_checkpoint, save_checkpoint
from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.errors import FastDLLMError
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer


def assert_same_weights(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def adapted(architecture="qwen2", *, dtype=torch.float32, vocab_size=64):
    model = tiny_model(architecture, dtype=dtype, vocab_size=vocab_size)
    checkpoint = Checkpoint(
        model=model, tokenizer=tiny_tokenizer(), config=AUTOREGRESSIVE, stop_token_ids=(3, 1), origin="a test"
    )
    add_mask_token(checkpoint)
    checkpoint.config = replace(checkpoint.config, block_size=8, context_attention="block")
    return checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_checkpoint_comes_back_bit_for_bit(tmp_path, architecture, dtype):
    saved = adapted(architecture, dtype=dtype)
    save_checkpoint(saved, tmp_path / "out", recipe={"learning_rate": 1e-4})
    loaded = load_checkpoint(tmp_path / "out")
    assert_same_weights(saved.model, loaded.model)
    assert loaded.config == saved.config
    assert loaded.stop_token_ids == (3, 1)
    assert loaded.tokenizer.mask_token_id == saved.config.mask_token_id
    assert not loaded.model.training
    assert "learning_rate" in (tmp_path / "out" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_model_comes_back_as_an_autoregressive_one(tmp_path, architecture):
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    loaded = load_checkpoint(str(tmp_path))
    assert_same_weights(model, loaded.model)
    assert loaded.tokenizer is None
    assert loaded.config == AUTOREGRESSIVE
    assert loaded.stop_token_ids == (3,)
    assert loaded.max_length == 512
    assert loaded.model.config._attn_implementation == "sdpa"


def test_sharded_model_comes_back(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_weights(model, load_checkpoint(tmp_path).model)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_is_the_one_asked_for(tmp_path, dtype):
    tiny_model("llama").save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path, dtype=dtype).model.dtype == torch.bfloat16
    assert load_checkpoint(tmp_path, dtype="auto").model.dtype == torch.float32


def test_settings_override_a_plain_model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    loaded = load_checkpoint(tmp_path, mask_token_id=60, block_size=4, token_shift=False)
    assert loaded.config == BlockDiffusionConfig(mask_token_id=60, block_size=4, token_shift=False)
    full = load_checkpoint(tmp_path, mask_token_id=60, context_attention="full")
    assert full.config == BlockDiffusionConfig(mask_token_id=60, context_attention="full")


def test_settings_override_an_adapted_model(tmp_path):
    save_checkpoint(adapted(), tmp_path)
    assert load_checkpoint(tmp_path, block_size=4).config == BlockDiffusionConfig(mask_token_id=54, block_size=4)


def test_mask_token_named_in_the_config_is_used_when_diffusion_is_asked_for(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask_token_id": 61}))
    assert load_checkpoint(tmp_path).config == AUTOREGRESSIVE
    assert load_checkpoint(tmp_path, context_attention="full").config.mask_token_id == 61


def test_plain_transformers_reads_what_we_save(tmp_path):
    saved = adapted("llama")
    save_checkpoint(saved, tmp_path)
    assert_same_weights(saved.model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"))


def test_saving_again_replaces_the_checkpoint(tmp_path):
    save_checkpoint(adapted("llama"), tmp_path / "out")
    save_checkpoint(adapted("qwen3"), tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").model.config.model_type == "qwen3"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_saving_does_not_overwrite_what_is_not_ours(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(FastDLLMError, match="not a fast-dllm checkpoint"):
        save_checkpoint(adapted(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    first = adapted("llama")
    save_checkpoint(first, tmp_path / "out")
    second = adapted("qwen3")
    monkeypatch.setattr(second.tokenizer, "save_pretrained", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(FastDLLMError, match="disk full"):
        save_checkpoint(second, tmp_path / "out")
    assert_same_weights(first.model, load_checkpoint(tmp_path / "out").model)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"sliding_window": 16}, 16),
        ({"sliding_window": 4096}, 512),
        ({"sliding_window": None}, 512),
    ],
)
def test_sliding_window_limits_the_context(tmp_path, overrides, expected):
    tiny_model("mistral", **overrides).save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path).max_length == expected


def test_rope_with_other_frequencies_for_long_sequences_limits_the_context(tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope |= {"original_max_position_embeddings": 128}
    tiny_model("llama", rope_parameters=rope).save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path).max_length == 128


@pytest.mark.parametrize(("use", "expected"), [(True, 16), (False, 512)])
def test_sliding_window_counts_only_when_switched_on(tmp_path, use, expected):
    tiny_model("qwen2", use_sliding_window=use, sliding_window=16, max_window_layers=0).save_pretrained(tmp_path)
    assert load_checkpoint(tmp_path).max_length == expected
