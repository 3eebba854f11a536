"""QLoRA: an adapter over a base in 4 bits. bitsandbytes is not among what `make test` installs: it is 125 MB."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fast_dllm.checkpoint import load_checkpoint
from fast_dllm.errors import FastDLLMError
from fast_dllm.training.adapt import adapt
from fast_dllm.training.options import AdaptOptions
from fast_dllm.training.quantised import quantise_linears
from samples import make_samples
from tiny import save_tiny, tiny_model

OPTIONS = AdaptOptions(
    steps=12, batch_size=4, learning_rate=1e-2, warmup_steps=0, max_length=64, block_size=8, lora_base="nf4"
)


@pytest.fixture
def base(tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 128}
    return Path(save_tiny(tmp_path / "base", adapted=False, architecture="qwen2", **shape))


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


@pytest.mark.usefixtures("bitsandbytes")
def test_only_the_decoders_linear_layers_are_quantised():
    model = tiny_model("qwen2", hidden_size=64, intermediate_size=128).float()
    quantise_linears(model, torch.float32)
    layer = model.model.layers[0]
    assert layer.mlp.down_proj.weight.dtype == layer.self_attn.q_proj.weight.dtype == torch.uint8
    assert layer.self_attn.q_proj.bias.dtype == model.lm_head.weight.dtype == torch.float32


@pytest.mark.usefixtures("bitsandbytes")
def test_an_adapter_learns_over_a_base_in_four_bits_and_serves_over_the_dense_one(base, tmp_path):
    samples = make_samples(24)
    result = adapt(base, samples, OPTIONS, tmp_path / "out", held_out=samples[:8])
    assert result.loss_after < 0.9 * result.loss_before
    weights = load_checkpoint(tmp_path / "out").model.state_dict()
    dense = load_checkpoint(base).model.state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    assert weights[name].dtype == dense[name].dtype
    assert 0 < (weights[name] - dense[name]).norm() < dense[name].norm()


def test_a_base_in_four_bits_is_not_trained_itself():
    with pytest.raises(FastDLLMError, match="need a lora_rank"):
        replace(OPTIONS, lora_rank=0)


def test_who_lacks_bitsandbytes_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(FastDLLMError, match="pip install"):
        quantise_linears(tiny_model("qwen2", hidden_size=64, intermediate_size=128), torch.float32)
