"""The mask token's embedding row: peft's answers and gradients, without its copies of the whole matrix."""

import pytest
import torch
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from torch.utils._python_dispatch import TorchDispatchMode

from fast_dllm.training import lora
from fast_dllm.training.lora import wrap_with_lora
from fast_dllm.training.options import AdaptOptions
from tiny import tiny_model

MASK, VOCABULARY, HIDDEN = 5, 64, 32
IDS = torch.tensor([[7, MASK, 9, 11, MASK], [MASK, 3, 8, 8, 2]])


def wrapped(architecture, dtype="float32"):
    torch.manual_seed(0)
    model = wrap_with_lora(tiny_model(architecture), MASK, AdaptOptions(lora_rank=4, dtype=dtype), None)
    for parameter in model.parameters():
        if parameter.requires_grad:  # B of LoRA begins at 0, the row as it was: move both
            parameter.data.add_(torch.randn(parameter.shape) / 10)
    return model


def logits_and_gradients(model):
    logits = model(input_ids=IDS).logits
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), IDS.flatten())
    return logits, dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


class Shapes(TorchDispatchMode):
    """Every shape that an operator returns."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_view = func.is_view or func in (torch.ops.aten.t.default, torch.ops.aten.detach.default)
        if isinstance(out, torch.Tensor) and not is_view:
            self.seen.add(tuple(out.shape))
        return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["smollm2", "llama"])
def test_trained_rows_are_pefts(architecture, dtype, monkeypatch):
    results = []
    for ours in (True, False):
        if not ours:
            monkeypatch.setattr(lora, "train_rows_alone", lambda model: None)
        model = wrapped(architecture, dtype)
        assert any(type(module) is TrainableTokensLayer for module in model.modules()) is not ours
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            results.append(logits_and_gradients(model))
    torch.testing.assert_close(results[0], results[1], atol=1e-6 if dtype == "float32" else 1e-2, rtol=1e-5)
    (name,) = (name for name in results[0][1] if "trainable_tokens" in name)
    assert results[0][1][name].abs().sum() > 0


@pytest.mark.parametrize("architecture", ["smollm2", "llama"])
def test_no_gradient_or_copy_of_the_embedding_is_made(architecture):
    model = wrapped(architecture)
    with Shapes() as shapes:
        logits_and_gradients(model)
    assert (*IDS.shape, VOCABULARY) in shapes.seen  # the mode sees what is computed
    assert not shapes.seen & {(VOCABULARY, HIDDEN), (HIDDEN, VOCABULARY)}


def test_merged_rows_are_what_was_trained():
    model = wrapped("smollm2")
    expected = model(input_ids=IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, expected)
