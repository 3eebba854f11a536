"""What a run leaves on disk on its way: saves that can be gone on from, and settings that may change."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fast_dllm.checkpoint import is_gated, load_checkpoint
from fast_dllm.errors import FastDLLMError
from fast_dllm.training.adapt import adapt
from fast_dllm.training.trainer import BlockDiffusionTrainer
from interrupted import adapt_up_to
from samples import GATED, make_samples
from samples import SHORT as OPTIONS
from tiny import save_tiny

KINDS = {
    "adapter": OPTIONS,
    "gated": GATED,
    "whole": replace(OPTIONS, lora_rank=0),
    "autoregressive": replace(OPTIONS, objective="ar"),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(save_tiny(tmp_path / "base", adapted=False, architecture="llama"))


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_checkpoint(directory).model(torch.arange(4, 55)[None]).logits


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_a_save_is_a_checkpoint(base, tmp_path, options):
    adapt(base, make_samples(), options, tmp_path / "out")
    last = tmp_path / "out.run" / "checkpoint-6"
    saved, finished = load_checkpoint(last), load_checkpoint(tmp_path / "out")
    assert saved.config == finished.config
    assert saved.tokenizer is not None
    assert saved.stop_token_ids == finished.stop_token_ids
    assert is_gated(last) == options.gated_lora
    assert torch.equal(logits(last), logits(tmp_path / "out"))
    assert not torch.equal(logits(tmp_path / "out.run" / "checkpoint-4"), logits(last))


@pytest.mark.parametrize("options", [OPTIONS, GATED], ids=["adapter", "gated"])
def test_another_run_goes_on_from_a_save(base, tmp_path, options):
    adapt(base, make_samples(), options, tmp_path / "out")
    save = tmp_path / "out.run" / "checkpoint-4"
    adapt(save, make_samples(), replace(options, steps=1, learning_rate=1e-6), tmp_path / "next")
    torch.testing.assert_close(logits(tmp_path / "next"), logits(save), atol=1e-3, rtol=1e-3)
    assert load_checkpoint(tmp_path / "next").base == str(base)


def test_what_was_tried_before_the_first_save_binds_nobody(base, tmp_path):
    adapt_up_to(1, base, OPTIONS, tmp_path / "out")
    other = replace(OPTIONS, learning_rate=1e-3, seed=5)
    assert adapt(base, make_samples(), other, tmp_path / "out").steps == 6
    adapt(base, make_samples(), other, tmp_path / "alone")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "alone"))


def test_a_run_goes_on_with_other_settings_where_the_weights_do_not_depend_on_them(base, tmp_path):
    adapt_up_to(3, base, OPTIONS, tmp_path / "out")
    other = replace(
        OPTIONS, batch_size=2, accumulation=2, gradient_checkpointing=True, save_every=3, probe_items=0, max_minutes=9.0
    )
    assert adapt(base, make_samples(), other, tmp_path / "out").steps == 6
    adapt(base, make_samples(), OPTIONS, tmp_path / "whole")
    # In another order of sums: not to the bit.
    torch.testing.assert_close(logits(tmp_path / "out"), logits(tmp_path / "whole"), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("changes", [{"learning_rate": 1e-3}, {"batch_size": 2}, {"seed": 1}, {"max_length": 32}])
def test_and_with_no_others(base, tmp_path, changes):
    adapt_up_to(3, base, OPTIONS, tmp_path / "out")
    with pytest.raises(FastDLLMError, match=f"other settings .*{next(iter(changes))}"):
        adapt(base, make_samples(), replace(OPTIONS, **changes), tmp_path / "out")


def test_a_diverging_run_keeps_a_save_from_before(base, tmp_path, monkeypatch):
    real = BlockDiffusionTrainer.log

    def rising(self, logs, *args):
        if "loss" in logs:
            step = self.state.global_step
            logs["loss"] = 2.0 if step <= 24 else 2.0 + (step - 24) / 10
        real(self, logs, *args)

    monkeypatch.setattr(BlockDiffusionTrainer, "log", rising)
    options = replace(OPTIONS, steps=80, save_every=4, learning_rate=1e-4)
    # Over its last 20 steps the loss is 2.18 on average at step 32, 2.39 at 36, 3.55 at 49.
    with pytest.raises(FastDLLMError, match=r"step 49: the loss diverges: 3\.55 .*checkpoint-32, the last good save"):
        adapt(base, make_samples(), options, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out.run").glob("checkpoint-*")} == {"checkpoint-32", "checkpoint-48"}
    assert load_checkpoint(tmp_path / "out.run" / "checkpoint-32").config.block_size == OPTIONS.block_size
