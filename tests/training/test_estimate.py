"""Estimates against what tiny models really take."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    RwkvConfig,
    T5Config,
)

from fast_dllm.cli import main
from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.data.chat import Sample
from fast_dllm.data.packing import pack
from fast_dllm.errors import FastDLLMError
from fast_dllm.training.estimate import GIB, Devices, check, estimate, positions
from fast_dllm.training.lora import open_adapter, wrap_with_lora
from fast_dllm.training.options import AdaptOptions
from fast_dllm.training.recompute import is_kept, recompute_cheap_operations, recompute_layers
from fast_dllm.training.schedule import StreamCollator
from fast_dllm.training.trainer import with_training_forward
from tiny import tiny_model, tiny_tokenizer

OPTIONS = AdaptOptions(batch_size=2, max_length=256, dtype="float32", lora_rank=0)


SHAPE = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "head_dim": 16}
VOCABULARY = 128  # no other width is the same


def gpt2_config(**settings):
    return GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=4, n_head=4, n_positions=512, **settings)


def gemma2():
    """Its attention is transformers' own: eager."""
    config = Gemma2Config(**SHAPE, vocab_size=VOCABULARY, num_attention_heads=4, num_key_value_heads=2)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


FAMILIES = {
    "llama": lambda: tiny_model("llama", vocab_size=VOCABULARY, **SHAPE),
    "gpt2": lambda: GPT2LMHeadModel(gpt2_config(resid_pdrop=0.0, embd_pdrop=0.0)),
    "gemma2": gemma2,
}


def model_of(options=OPTIONS, family="llama"):
    """A model that is trained, and the config of its base."""
    model = FAMILIES[family]()
    if options.lora_rank and options.dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    attention = "causal" if options.objective == "ar" else options.context_attention
    config = deepcopy(model.config)
    model = with_training_forward(model, attention)
    if options.lora_rank:
        model = wrap_with_lora(model, 5, options, None)
    return model.train(), config


def batch_of(options):
    row = Sample(input_ids=[7] * options.max_length, loss_mask=[True] * options.max_length)
    rows = pack([row] * options.batch_size, length=options.max_length, block_size=32, pad_id=5)
    is_ar = options.objective == "ar"
    attention = "causal" if is_ar else "block"
    config = BlockDiffusionConfig(mask_token_id=5, block_size=32, context_attention=attention)
    collator = StreamCollator(
        config=config,
        complementary=True,
        with_ar=is_ar,
        with_diffusion=not is_ar,
        seed=0,
        mask_ratio=options.mask_ratio,
    )
    batch = collator(list(enumerate(rows)))
    return {key: value for key, value in batch.items() if key not in ("labels", "hidden_share", "place")}


def arithmetic(options):
    return torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16")


def size(tensors):
    """Bytes of the storages of some tensors, each once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_weights_gradients_and_moments_are_those_of_the_model(family, lora_rank):
    options = replace(OPTIONS, lora_rank=lora_rank)
    model, config = model_of(options, family)
    found = estimate(config, options, Devices(GIB))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    model(**batch_of(options)).sum().backward()
    optimizer.step()
    moments = [x for state in optimizer.state.values() for name, x in state.items() if name != "step"]
    assert found.trainable == sum(parameter.numel() for parameter in trainable)
    assert found.weights == size(model.parameters())
    assert found.gradients == size(parameter.grad for parameter in trainable)
    assert found.optimizer == size(moments)


@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_loaded_in_what_was_estimated(tmp_path, lora_rank, dtype):
    options = replace(OPTIONS, lora_rank=lora_rank, dtype=dtype)
    FAMILIES["llama"]().to(torch.bfloat16).save_pretrained(tmp_path)
    checkpoint, _ = open_adapter(tmp_path, options)
    assert estimate(checkpoint.model.config, options, Devices(GIB)).loading == size(checkpoint.model.parameters())


class _Casts(TorchDispatchMode):
    """Copies of parameters that autocast makes."""

    def __init__(self, model):
        super().__init__()
        self.tensors = []
        self._parameters = {x.data_ptr() for x in model.parameters()}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if operation == torch.ops.aten._to_copy.default and args[0].data_ptr() in self._parameters:
            self.tensors.append(out)
        return out


@pytest.mark.parametrize("lora_rank", [0, 8])
def test_in_bfloat16_the_copies_of_autocast_are_weights_too(lora_rank):
    options = replace(OPTIONS, lora_rank=lora_rank, dtype="bfloat16")
    model, config = model_of(options)
    with arithmetic(options), _Casts(model) as copies:
        model(**batch_of(options))
    found = estimate(config, options, Devices(GIB))
    assert found.weights == size(model.parameters()) + size(copies.tensors)


class _Kept(TorchDispatchMode):
    """What a forward leaves for its backward: what autograd saves, and what selective recomputing keeps."""

    def __init__(self, model, *, is_selective):
        super().__init__()
        self.tensors = []
        self._parameters = {x.data_ptr() for x in model.parameters()}
        self._is_selective = is_selective

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if self._is_selective and is_kept(operation, args) and torch.is_grad_enabled():
            self.save(out[0] if isinstance(out, tuple) else out)
        return out

    def save(self, tensor):
        if tensor.data_ptr() not in self._parameters:
            self.tensors.append(tensor)
        return tensor


def kept_by(model, options):
    """Bytes that a forward leaves for its backward, but for logits."""
    kept = _Kept(model, is_selective=not (options.gradient_checkpointing or options.lora_rank))
    with arithmetic(options), kept, torch.autograd.graph.saved_tensors_hooks(kept.save, lambda tensor: tensor):
        loss = model(**batch_of(options)).sum()
    assert loss.isfinite()
    return size(tensor for tensor in kept.tensors if tensor.shape[-1:] != (VOCABULARY,))


def not_left(options, family):
    """Bytes of an estimate that are not left by a forward: of logits, of masks, and of a layer that is done again."""
    per_row, _ = positions(options)
    logits, masks = 3 * 4 * 512 * VOCABULARY, 2 * per_row * (per_row // 4)
    if options.lora_rank and not options.gradient_checkpointing:
        return logits + masks
    width = 2 if options.dtype == "bfloat16" else 4
    norms = 2 * 64 * (4 * (1 if options.lora_rank else 2) + width)
    widths = {"llama": 2 * (64 + 32) + 4 * 192, "gpt2": 2 * (64 + 64) + 5 * 256, "gemma2": 2 * (64 + 32) + 4 * 192}
    scores = 4 * per_row * 8 if family == "gemma2" else 0
    layer = norms + widths[family] * width + scores + 7 * options.lora_rank * 4
    return logits + masks + 2 * per_row * layer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("objective", ["diffusion", "ar"])
@pytest.mark.parametrize(("lora_rank", "layers"), [(0, False), (0, True), (8, False), (8, True)])
def test_activations_are_what_is_kept(family, dtype, objective, lora_rank, layers):
    options = replace(OPTIONS, lora_rank=lora_rank, gradient_checkpointing=layers, dtype=dtype, objective=objective)
    model, config = model_of(options, family)
    base = model.get_base_model() if lora_rank else model
    if layers:
        recompute_layers(base)
    elif not lora_rank:
        recompute_cheap_operations(base)
    found = estimate(config, options, Devices(GIB)).activations - not_left(options, family)
    assert kept_by(model, options) == pytest.approx(found, rel=0.2)


@pytest.mark.parametrize("objective", ["diffusion", "ar"])
def test_a_row_is_as_long_as_it_is_laid_out(objective):
    options = replace(OPTIONS, objective=objective)
    batch, (per_row, scored) = batch_of(options), positions(options)
    assert 0 <= per_row - batch["input_ids"].shape[1] <= 1  # nobody predicts a row's first token
    assert 0 <= scored - len(batch["read"]) / 2 <= 1


@pytest.mark.parametrize("mask_ratio", [None, 1.0])
def test_of_a_gated_adapter_no_clean_token_is_kept(mask_ratio):
    options = replace(OPTIONS, lora_rank=8, gated_lora=True, context_attention="causal", mask_ratio=mask_ratio)
    model, config = model_of(options)
    found, plain = (estimate(config, run, Devices(GIB)) for run in (options, replace(options, gated_lora=False)))
    assert kept_by(model, options) == pytest.approx(found.activations - not_left(options, "llama"), rel=0.2)
    assert found.activations < 0.75 * plain.activations
    assert found.flops < 0.85 * plain.flops


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("objective", ["diffusion", "ar"])
def test_arithmetic_is_what_is_computed(family, objective):
    options = replace(OPTIONS, objective=objective)
    model, config = model_of(options, family)
    recompute_cheap_operations(model)
    with FlopCounterMode(display=False) as counter:
        model(**batch_of(options)).sum().backward()
    products = sum(count for name, count in counter.get_flop_counts()["Global"].items() if str(name).endswith("mm"))
    # torch counts products of matrices; attention on a CPU is one operation to it.
    found = estimate(config, options, Devices(GIB)).flops_per_step
    per_row, _ = positions(options)
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


@pytest.mark.parametrize("model_type", ["gpt_neox", "opt", "bloom", "gptj", "phi3", "gemma3"])
def test_layers_and_widths_are_found_whatever_a_family_calls_them(model_type):
    config = AutoConfig.for_model(model_type)
    before = config.to_dict()
    found = estimate(config, OPTIONS, Devices(GIB))
    assert config.to_dict() == before
    assert found.trainable == found.parameters > 0
    assert found.activations > 0


@pytest.mark.parametrize(
    ("config", "error"),
    [
        (T5Config(), "it is no decoder-only language model"),
        (RwkvConfig(num_hidden_layers=2), "no list of layers with attention is found in it"),
        (MixtralConfig(num_hidden_layers=2), "many weights of its layers are in no linear layer"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_model_that_cannot_be_estimated_is_refused_in_one_line(config, error):
    with pytest.raises(FastDLLMError, match=f"^model_type='{config.model_type}': cannot be estimated: {error}"):
        estimate(config, OPTIONS, Devices(GIB))


def test_gpt2_is_estimated_and_adapted(tmp_path, capfd):
    """Its layers, their products and their widths have names and classes of their own."""
    model, data = tmp_path / "gpt2", tmp_path / "chats.jsonl"
    GPT2LMHeadModel(gpt2_config(bos_token_id=2, eos_token_id=3)).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    turns = [{"role": "user", "content": "add 1 and 1"}, {"role": "assistant", "content": "it is 2."}]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 8)
    command = ["adapt", "--model", str(model), "--data", str(data), "--out", str(tmp_path / "out"), "--steps", "1"]
    command += ["--max-length", "64", "--block-size", "8", "--batch-size", "2", "--eval-samples", "0"]
    capfd.readouterr()
    assert main([*command, "--dry-run"]) == 0
    told = capfd.readouterr()
    assert told.err == ""
    assert "parameters     0.2 million" in told.out
    assert main(command) == 0
    assert "steps          1 of 1" in capfd.readouterr().out
