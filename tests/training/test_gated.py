"""Gated adapters: trained, saved and loaded, they leave every token but the mask as it was."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fast_dllm import BlockDiffusionLM
from fast_dllm.checkpoint import load_checkpoint, save_checkpoint
from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.errors import FastDLLMError
from fast_dllm.gated_lora import gate_adapter, gated_token
from fast_dllm.noise import draw_views
from fast_dllm.objective import lay_out
from fast_dllm.training import trainer as trainer_module
from fast_dllm.training.adapt import adapt
from fast_dllm.training.lora import wrap_with_lora
from fast_dllm.training.trainer import with_training_forward
from samples import GATED as OPTIONS
from samples import make_samples
from tiny import ARCHITECTURES, save_tiny, tiny_model

MASK, BLOCK = 63, OPTIONS.block_size


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(save_tiny(tmp_path / "base", adapted=False, architecture="llama"))


def moved(model):
    """The model with every trained parameter moved, in place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def gated_model(architecture="llama", **settings):
    model = with_training_forward(tiny_model(architecture, **settings), "causal")
    return moved(wrap_with_lora(model, MASK, OPTIONS, None))


def streams(*, ratio=None, rows=3, blocks=4):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, MASK, (rows, blocks * BLOCK), generator=generator)
    starts = torch.randint(0, blocks * BLOCK, (rows, 1), generator=generator)
    loss_mask = torch.arange(blocks * BLOCK) >= starts
    views = draw_views(loss_mask, BLOCK, generator, mask_ratio=ratio)
    laid_out = lay_out(ids, loss_mask, views, BlockDiffusionConfig(mask_token_id=MASK, block_size=BLOCK))
    arguments = laid_out._asdict()
    arguments.pop("origin")
    return arguments | {"tokens": torch.stack(laid_out.tokens)}


@pytest.mark.parametrize("ratio", [None, 1.0])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_clean_tokens_run_first_and_the_losses_and_gradients_are_those_of_one_forward(architecture, ratio, monkeypatch):
    model, batch = gated_model(architecture, dtype=torch.float64), streams(ratio=ratio)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    apart = model(**batch)
    of_apart = torch.autograd.grad(apart.sum(), trained)
    monkeypatch.setattr(trainer_module, "gated_token", lambda model: None)
    together = model(**batch)
    of_together = torch.autograd.grad(together.sum(), trained)
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-5)
    assert len(apart) == batch["targets"].numel() > 20
    for one, other in zip(of_apart, of_together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)  # token_losses scores in float32


def test_recomputed_layers_give_the_same_losses():
    model, batch = gated_model(), streams()
    plain = model(**batch)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    torch.testing.assert_close(model(**batch), plain, atol=1e-5, rtol=1e-5)


def test_only_masks_feel_the_adapter():
    model = gated_model().get_base_model()
    plain = tiny_model("llama")
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(type(plain).forward(model, ids).logits, plain(ids).logits)
        ids[0, -1] = MASK
        felt = type(plain).forward(model, ids).logits - plain(ids).logits
    assert felt[0, :-1].abs().max() == 0
    assert felt[0, -1].abs().max() > 0.1


@pytest.mark.parametrize("backbone", ["hf", "native"])
def test_a_trained_adapter_answers_as_its_base_does(base, tmp_path, backbone):
    adapt(base, make_samples(), OPTIONS, tmp_path / "gated")
    before = BlockDiffusionLM.from_pretrained(base, backbone=backbone)
    after = BlockDiffusionLM.from_pretrained(tmp_path / "gated", backbone=backbone)
    assert gated_token(after.checkpoint.model) == after.config.mask_token_id
    assert "is not to be merged" in (tmp_path / "gated" / "README.md").read_text()
    assert not any("token_adapter" in name for name, _ in after.checkpoint.model.named_modules())
    prompts = [[5, 6, 7, 8], [9], [20, 21, 22, 23, 24, 25, 26, 27, 28]]
    plain = before.generate(prompts, return_dict=True, max_new_tokens=24)
    drafted = after.generate(prompts, return_dict=True, max_new_tokens=24)
    assert drafted.answers == plain.answers
    assert drafted.total.withdrawn_tokens > 0


def test_training_lowers_the_loss_and_leaves_the_base(base, tmp_path):
    held_out = make_samples()[:8]
    options = replace(OPTIONS, steps=40, eval_samples=8)
    result = adapt(base, make_samples(), options, tmp_path / "gated", held_out=held_out)
    assert result.loss_after < result.loss_before - 0.3
    trained = load_checkpoint(tmp_path / "gated")
    weights, mask = trained.model.state_dict(), trained.config.mask_token_id
    for name, value in load_checkpoint(base).model.state_dict().items():
        beneath = name if name in weights else name.replace("_proj.", "_proj.base_layer.")
        rows = slice(mask) if name.startswith(("lm_head", "model.embed")) else slice(None)
        assert torch.equal(weights[beneath][rows], value[rows]), name


def test_a_gated_adapter_goes_on_top_of_a_merged_one_and_is_trained_on(base, tmp_path):
    plain = replace(OPTIONS, gated_lora=False, mask_ratio=None, objective="ar")
    adapt(base, make_samples(), plain, tmp_path / "tuned")
    adapt(tmp_path / "tuned", make_samples(), OPTIONS, tmp_path / "first")
    adapt(tmp_path / "first", make_samples(), OPTIONS, tmp_path / "second")
    first, second = (load_checkpoint(tmp_path / name) for name in ("first", "second"))
    assert first.base == second.base == str((tmp_path / "tuned").resolve())
    tuned = load_checkpoint(tmp_path / "tuned").model
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        expected = tuned(ids).logits
        for model in (first.model, second.model):
            assert torch.equal(model(ids).logits, expected)
    before, after = first.model.state_dict(), second.model.state_dict()
    assert any("lora" in name for name, value in before.items() if not torch.equal(value, after[name]))


def test_drafts_follow_another_fine_tune(base, tmp_path):
    plain = replace(OPTIONS, gated_lora=False, mask_ratio=None, objective="ar")
    for seed, name in enumerate(("tuned", "other")):
        adapt(base, make_samples(), replace(plain, seed=seed), tmp_path / name)
    adapt(tmp_path / "tuned", make_samples(), OPTIONS, tmp_path / "drafts")
    other = str(tmp_path / "other")
    adapt(tmp_path / "drafts", make_samples(), replace(OPTIONS, base=other), tmp_path / "following")
    tuned, following, beneath = (load_checkpoint(tmp_path / name) for name in ("tuned", "following", "other"))
    assert following.base == str((tmp_path / "other").resolve())
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert torch.equal(following.model(ids).logits, beneath.model(ids).logits)
        assert not torch.equal(tuned.model(ids).logits, beneath.model(ids).logits)
    with pytest.raises(FastDLLMError, match="not a LoRA adapter, so base="):
        adapt(base, make_samples(), replace(OPTIONS, base=other), tmp_path / "wrong")


def test_what_a_gated_adapter_cannot_be(base, tmp_path):
    adapt(base, make_samples(), OPTIONS, tmp_path / "gated")
    everywhere = replace(OPTIONS, gated_lora=False)
    with pytest.raises(FastDLLMError, match="go on training it with --gated-lora"):
        adapt(tmp_path / "gated", make_samples(), everywhere, tmp_path / "more")
    with pytest.raises(FastDLLMError, match="no whole model holds it"):
        save_checkpoint(load_checkpoint(tmp_path / "gated"), tmp_path / "whole")
    for wrong in ({"lora_rank": 0}, {"objective": "ar"}, {"ar_weight": 0.5}, {"context_attention": "block"}):
        with pytest.raises(FastDLLMError, match="gated_lora=True"):
            replace(OPTIONS, **wrong)


def test_layers_that_see_tokens_in_another_shape_are_refused():
    model = tiny_model("llama")
    wrapped = wrap_with_lora(model, MASK, replace(OPTIONS, gated_lora=False), None)
    gate_adapter(wrapped.get_base_model(), MASK)
    layer = model.model.layers[0].mlp.gate_proj
    with torch.no_grad():
        model(torch.arange(4, 20)[None])
        with pytest.raises(FastDLLMError, match="train a plain adapter"):
            layer(torch.zeros(16, 32))
