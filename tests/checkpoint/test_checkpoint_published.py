"""The published Fast-dLLM v2 layout: a Qwen2 by another name, read without its code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from fast_dllm.checkpoint import load_checkpoint, save_checkpoint
from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.errors import FastDLLMError
from tiny import tiny_model, tiny_tokenizer

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"


def publish(directory, *, tokenizer=True, **changes):
    tiny_model("qwen2").save_pretrained(directory)
    path = directory / "config.json"
    values = json.loads(path.read_text())
    values |= {
        "model_type": "Fast_dLLM_Qwen",
        "architectures": ["Fast_dLLM_QwenForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration.Fast_dLLM_QwenConfig",
            "AutoModelForCausalLM": "modeling.Fast_dLLM_QwenForCausalLM",
        },
        "bd_size": 16,
        **changes,
    }
    path.write_text(json.dumps(values))
    for name in ("configuration.py", "modeling.py"):
        (directory / name).write_text("raise SystemExit('remote code ran')\n")
    if tokenizer:
        made = tiny_tokenizer()
        made.add_special_tokens({"additional_special_tokens": ["|<MASK>|"]})
        made.save_pretrained(directory)
    return directory


def test_it_is_read_as_qwen2_with_its_block_size_and_mask_token(tmp_path):
    loaded = load_checkpoint(publish(tmp_path))
    assert isinstance(loaded.model, Qwen2ForCausalLM)
    assert loaded.config == BlockDiffusionConfig(mask_token_id=54, block_size=16)
    assert loaded.stop_token_ids == (3,)
    for name, weight in tiny_model("qwen2").state_dict().items():
        assert torch.equal(weight, loaded.model.state_dict()[name])


def test_saved_it_is_one_of_ours(tmp_path):
    loaded = load_checkpoint(publish(tmp_path / "published"))
    save_checkpoint(loaded, tmp_path / "ours")
    again = load_checkpoint(tmp_path / "ours")
    assert again.config == loaded.config
    assert "Fast_dLLM_Qwen" not in (tmp_path / "ours" / "config.json").read_text()


def test_without_a_tokenizer_the_mask_token_must_be_given(tmp_path):
    publish(tmp_path, tokenizer=False)
    with pytest.raises(FastDLLMError, match="give mask_token_id"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path, mask_token_id=60).config.mask_token_id == 60


def test_a_broken_block_size_is_refused(tmp_path):
    with pytest.raises(FastDLLMError, match="bd_size=None"):
        load_checkpoint(publish(tmp_path, bd_size=None))


@pytest.mark.skipif(not GOLDEN.exists(), reason="no golden data beside the repository")
@pytest.mark.parametrize("name", ["model_a", "model_b"])
def test_logits_are_those_of_the_published_code(name):
    recorded = load_file(GOLDEN / name / "tensors.safetensors")
    loaded = load_checkpoint(GOLDEN / name, mask_token_id=319)
    assert loaded.config == BlockDiffusionConfig(mask_token_id=319, block_size=32)
    assert loaded.stop_token_ids == (318,)
    ids = recorded["eval70.input_ids"]
    block = torch.arange(ids.shape[1]) // 32
    visible = (block[:, None] >= block[None, :]).expand(ids.shape[0], 1, -1, -1)
    with torch.no_grad():
        logits = loaded.model(ids, attention_mask=visible).logits
    torch.testing.assert_close(logits, recorded["eval70.logits"], atol=2e-3, rtol=1e-4)
