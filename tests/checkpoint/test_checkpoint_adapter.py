"""LoRA adapters: small on disk, and merged they are the model that was trained."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fast_dllm.checkpoint import add_mask_token, load_checkpoint, save_adapter, save_checkpoint
from fast_dllm.checkpoint.checkpoint import TRAINED_ON_KEY
from fast_dllm.errors import FastDLLMError
from tiny import tiny_model, tiny_tokenizer

IDS = torch.arange(4, 40)[None]


def make_base(directory, architecture="smollm2", *, vocab_size=64, dtype=torch.float32, seed=0):
    tiny_model(architecture, vocab_size=vocab_size, dtype=dtype, seed=seed).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def train(base, **load_options):
    """A checkpoint and a peft model on it, all of whose trained weights have moved."""
    checkpoint = load_checkpoint(base, **load_options)
    mask = add_mask_token(checkpoint)
    checkpoint.config = replace(checkpoint.config, block_size=8, context_attention="block")
    embedding = "embed_tokens"
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "down_proj"],
        trainable_token_indices={embedding: [mask]},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(checkpoint.model, lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return checkpoint, model.eval()


@pytest.mark.parametrize("architecture", ["smollm2", "llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("vocab_size", [64, 54])  # a padding row reused, a row added
def test_merged_adapter_gives_the_trained_model(tmp_path, architecture, vocab_size):
    base = make_base(tmp_path / "base", architecture, vocab_size=vocab_size)
    checkpoint, model = train(base)
    ids = torch.cat([IDS, torch.tensor([[54]])], dim=1)
    with torch.no_grad():
        trained = model(ids).logits
    save_adapter(model, tmp_path / "adapter", checkpoint=checkpoint, recipe={"steps": 3})
    loaded = load_checkpoint(tmp_path / "adapter")
    with torch.no_grad():
        merged = loaded.model(ids).logits
    torch.testing.assert_close(merged, trained, atol=1e-4, rtol=1e-4)
    assert loaded.config == checkpoint.config
    assert loaded.tokenizer.mask_token_id == 54
    assert loaded.stop_token_ids == checkpoint.stop_token_ids
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    tied = architecture in {"smollm2", "qwen2"}
    assert (loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight) == tied


def test_merged_adapter_can_be_saved_as_a_whole_model(tmp_path):
    checkpoint, model = train(make_base(tmp_path / "base", vocab_size=54))
    save_adapter(model, tmp_path / "adapter", checkpoint=checkpoint)
    merged = load_checkpoint(tmp_path / "adapter")
    save_checkpoint(merged, tmp_path / "whole")
    whole = load_checkpoint(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(whole.model(IDS).logits, merged.model(IDS).logits)
    assert whole.config == checkpoint.config


def test_bfloat16_base_is_merged_in_float32(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    checkpoint, model = train(base, dtype="float32")
    save_adapter(model, tmp_path / "adapter", checkpoint=checkpoint)
    exact = model.merge_and_unload().state_dict()
    rounded = load_checkpoint(tmp_path / "adapter").model.state_dict()
    for name, weight in rounded.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, exact[name].bfloat16()), name
    wide = load_checkpoint(tmp_path / "adapter", dtype="float32").model.state_dict()
    assert torch.equal(wide["model.norm.weight"], exact["model.norm.weight"])


def test_adapter_is_small_and_holds_no_embedding(tmp_path):
    checkpoint, model = train(make_base(tmp_path / "base", vocab_size=3000))
    save_adapter(model, tmp_path / "adapter", checkpoint=checkpoint)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 3000 * 32 * 4 / 4
    assert json.loads((tmp_path / "adapter" / "block_diffusion.json").read_text())["mask_token"] == "|<MASK>|"


@pytest.mark.parametrize("file", ["adapter/block_diffusion.json", "whole/config.json"])
@pytest.mark.parametrize("wrong", [7, ["gcd"], [{"tasks": ["gcd"]}], [{"tasks": ["gcd"], "items": "many"}]])
def test_a_record_of_the_training_that_cannot_be_read_is_told(file, wrong, tmp_path):
    checkpoint, model = train(make_base(tmp_path / "base", vocab_size=54))
    save_adapter(model, tmp_path / "adapter", checkpoint=checkpoint)
    save_checkpoint(load_checkpoint(tmp_path / "adapter"), tmp_path / "whole")
    path = tmp_path / file
    path.write_text(json.dumps({**json.loads(path.read_text()), TRAINED_ON_KEY: wrong}))
    with pytest.raises(FastDLLMError, match=f"{path.name}: {TRAINED_ON_KEY}: must be a list"):
        load_checkpoint(path.parent)


def test_adapter_with_a_whole_embedding_is_refused(tmp_path):
    checkpoint = load_checkpoint(make_base(tmp_path / "base"))
    model = get_peft_model(checkpoint.model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    with pytest.raises(FastDLLMError, match="trainable_token_indices"):
        save_adapter(model, tmp_path / "adapter", checkpoint=checkpoint)
    assert not (tmp_path / "adapter").exists()


def test_plain_peft_adapter_gives_an_autoregressive_model(tmp_path):
    checkpoint = load_checkpoint(make_base(tmp_path / "base"))
    model = get_peft_model(checkpoint.model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_checkpoint(tmp_path / "adapter", base=tmp_path / "base")
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    assert loaded.config.block_size == 1
    assert load_checkpoint(tmp_path / "adapter", base=tmp_path / "base", mask_token_id=60).config.block_size == 32


def test_an_adapter_can_be_the_base_of_another(tmp_path):
    first, model = train(make_base(tmp_path / "base", vocab_size=54))
    save_adapter(model, tmp_path / "first", checkpoint=first)
    second, model = train(tmp_path / "first")
    ids = torch.cat([IDS, torch.tensor([[54]])], dim=1)
    with torch.no_grad():
        trained = model(ids).logits
    save_adapter(model, tmp_path / "second", checkpoint=second)
    with torch.no_grad():
        torch.testing.assert_close(
            load_checkpoint(tmp_path / "second").model(ids).logits, trained, atol=1e-4, rtol=1e-4
        )


def test_base_may_have_moved(tmp_path):
    checkpoint, model = train(make_base(tmp_path / "base"))
    save_adapter(model, tmp_path / "adapter", checkpoint=checkpoint)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FastDLLMError, match="its base does not load"):
        load_checkpoint(tmp_path / "adapter")
    assert load_checkpoint(tmp_path / "adapter", base=tmp_path / "moved").config == checkpoint.config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fingerprint_does_not_depend_on_the_dtype(tmp_path, dtype):
    base = make_base(tmp_path / "base")
    assert load_checkpoint(base, dtype=dtype).fingerprint == load_checkpoint(base).fingerprint


def test_adapter_of_another_base_is_refused(tmp_path):
    checkpoint, model = train(make_base(tmp_path / "base"))
    save_adapter(model, tmp_path / "adapter", checkpoint=checkpoint)
    other = make_base(tmp_path / "other", seed=1)
    with pytest.raises(FastDLLMError, match="another base"):
        load_checkpoint(tmp_path / "adapter", base=other)
