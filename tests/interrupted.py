"""Runs of `adapt` that end before they are done."""

from pathlib import Path

import pytest
from transformers import TrainerCallback

from fast_dllm.training import adapt as adapt_module
from fast_dllm.training.adapt import adapt
from fast_dllm.training.options import AdaptOptions
from samples import make_samples


class _Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def adapt_up_to(step: int, base: Path, options: AdaptOptions, out: Path) -> None:
    """Adapt a model, and end as Ctrl-C does, after `step` updates."""
    real = adapt_module.BlockDiffusionTrainer

    def killed(*args, **kwargs):
        trainer = real(*args, **kwargs)
        trainer.add_callback(_Kill(step))
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapt_module, "BlockDiffusionTrainer", killed)
        with pytest.raises(KeyboardInterrupt):
            adapt(base, make_samples(), options, out)
