"""Estimates against what tiny models really take."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.data.chat import Sample
from fast_dllm.data.packing import pack
from fast_dllm.errors import FastDLLMError
from fast_dllm.training.estimate import GIB, Devices, check, estimate, positions
from fast_dllm.training.lora import wrap_with_lora
from fast_dllm.training.options import AdaptOptions
from fast_dllm.training.recompute import KEPT, recompute_cheap_operations, recompute_layers
from fast_dllm.training.schedule import StreamCollator
from fast_dllm.training.trainer import with_training_forward
from tiny import tiny_model

OPTIONS = AdaptOptions(batch_size=2, max_length=256, dtype="float32", lora_rank=0)


def _lora(rank, *, gated):
    attention = "causal" if gated else "block"
    return replace(OPTIONS, lora_rank=rank, gated_lora=gated, context_attention=attention)


def model_of(lora_rank=0, *, gated=False):
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "head_dim": 16}
    model = with_training_forward(tiny_model("llama", vocab_size=128, **shape), "causal" if gated else "block")
    config = model.config
    if lora_rank:
        model = wrap_with_lora(model, 5, _lora(lora_rank, gated=gated), None)
    return model.train(), config


def batch_of(options):
    row = Sample(input_ids=[7] * options.max_length, loss_mask=[True] * options.max_length)
    rows = pack([row] * options.batch_size, length=options.max_length, block_size=32, pad_id=5)
    config = BlockDiffusionConfig(mask_token_id=5, block_size=32)
    collator = StreamCollator(
        config=config, complementary=True, with_ar=False, with_diffusion=True, seed=0, mask_ratio=options.mask_ratio
    )
    batch = collator(list(enumerate(rows)))
    return {key: value for key, value in batch.items() if key not in ("labels", "hidden_share", "place")}


def size(tensors):
    """Bytes of the storages of some tensors, each once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("lora_rank", [0, 8])
def test_weights_gradients_and_moments_are_those_of_the_model(lora_rank):
    model, config = model_of(lora_rank)
    found = estimate(config, replace(OPTIONS, lora_rank=lora_rank), Devices(GIB))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    model(**batch_of(OPTIONS)).sum().backward()
    optimizer.step()
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    assert found.trainable == sum(parameter.numel() for parameter in trainable)
    assert found.weights == size(model.parameters())
    assert found.gradients == size(parameter.grad for parameter in trainable)
    assert found.optimizer == size(moments)


class _Kept(TorchDispatchMode):
    """What a forward leaves for its backward: what autograd saves, and what selective recomputing keeps."""

    def __init__(self, model, products):
        super().__init__()
        self.tensors = []
        self._parameters = {x.data_ptr() for x in model.parameters()}
        self._products = products

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation in self._products and torch.is_grad_enabled():
            self.save(out[0] if isinstance(out, tuple) else out)
        return out

    def save(self, tensor):
        if tensor.data_ptr() not in self._parameters:
            self.tensors.append(tensor)
        return tensor


@pytest.mark.parametrize(("lora_rank", "layers"), [(0, False), (0, True), (8, False), (8, True)])
def test_activations_are_what_is_kept(lora_rank, layers):
    model, config = model_of(lora_rank)
    base = model.get_base_model() if lora_rank else model
    if layers:
        recompute_layers(base)
    elif not lora_rank:
        recompute_cheap_operations(base)
    options = replace(OPTIONS, lora_rank=lora_rank, gradient_checkpointing=layers)
    batch = batch_of(options)
    kept = _Kept(model, set() if layers or lora_rank else KEPT)
    with kept, torch.autograd.graph.saved_tensors_hooks(kept.save, lambda tensor: tensor):
        loss = model(**batch).sum()
    per_row, _ = positions(options)
    assert batch["input_ids"].shape[1] == per_row
    logits = 3 * 4 * 512 * config.vocab_size
    # A layer that is computed again holds all it computes, one at a time; after the forward none does.
    norms, rest = (2 if lora_rank else 3) * 2 * 64, 2 * (64 + 32) + 4 * 192 + 7 * lora_rank
    layer = 4 * 2 * per_row * (norms + rest) if layers or not lora_rank else 0
    found = estimate(config, options, Devices(GIB)).activations
    assert size(kept.tensors) == pytest.approx(found - logits - layer, rel=0.2)
    assert loss.isfinite()


@pytest.mark.parametrize("mask_ratio", [None, 1.0])
def test_of_a_gated_adapter_no_clean_token_is_kept(mask_ratio):
    model, config = model_of(8, gated=True)
    options = replace(OPTIONS, lora_rank=8, gated_lora=True, context_attention="causal", mask_ratio=mask_ratio)
    kept = _Kept(model, set())
    with kept, torch.autograd.graph.saved_tensors_hooks(kept.save, lambda tensor: tensor):
        loss = model(**batch_of(options)).sum()
    found, plain = (estimate(config, run, Devices(GIB)) for run in (options, replace(options, gated_lora=False)))
    logits = 3 * 4 * 512 * config.vocab_size
    assert size(kept.tensors) == pytest.approx(found.activations - logits, rel=0.2)
    assert loss.isfinite()
    assert found.activations < 0.75 * plain.activations
    assert found.flops < 0.85 * plain.flops


def test_arithmetic_is_what_is_computed():
    model, config = model_of()
    with FlopCounterMode(display=False) as counter:
        model(**batch_of(OPTIONS)).sum().backward()
    products = sum(count for name, count in counter.get_flop_counts()["Global"].items() if str(name).endswith("mm"))
    # torch counts products of matrices; attention on a CPU is one operation to it.
    found = estimate(config, OPTIONS, Devices(GIB)).flops_per_step
    per_row, _ = positions(OPTIONS)
    attention = 2 * 4 * 64 * per_row * (128 + 96) * 4 * 4.5
    assert products == pytest.approx(found - attention, rel=0.05)


def test_rows_in_which_next_to_nothing_is_hidden_are_estimated():
    _, config = model_of()
    hardly = replace(OPTIONS, complementary=False, mask_ratio=1e-3)
    assert 0 < estimate(config, hardly, Devices(GIB)).flops < estimate(config, OPTIONS, Devices(GIB)).flops


def test_what_does_not_fit_is_refused_with_what_would():
    _, config = model_of()
    need = estimate(config, OPTIONS, Devices(GIB)).memory
    assert check(config, OPTIONS, Devices(int(need / 0.89))).memory == need
    with pytest.raises(FastDLLMError, match=r"does not fit: .* --batch-size 1 --accumulation 2 would do"):
        check(config, OPTIONS, Devices(need))
    with pytest.raises(FastDLLMError, match="a smaller model or larger devices are needed"):
        check(config, OPTIONS, Devices(1000))


def test_sharding_divides_what_the_model_takes():
    _, config = model_of()
    one = estimate(config, OPTIONS, Devices(GIB))
    four = estimate(config, OPTIONS, Devices(GIB, processes=4, sharded=True))
    assert (one.gradients, one.optimizer) == (4 * four.gradients, 4 * four.optimizer)
    assert estimate(config, OPTIONS, Devices(GIB, processes=4)).gradients == 2 * one.gradients  # and DDP's buckets


def test_recomputing_changes_no_gradient():
    gradients = []
    for change in (lambda model: None, recompute_cheap_operations, recompute_layers):
        model, _ = model_of()
        change(model)
        model(**batch_of(OPTIONS)).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for others in gradients[1:]:
        assert all(torch.equal(gradient, others[name]) for name, gradient in gradients[0].items())
