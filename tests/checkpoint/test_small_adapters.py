"""What makes the adapters in the package small: fewer ranks, and 8-bit floats."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fast_dllm.checkpoint import load_checkpoint, save_checkpoint
from fast_dllm.training.adapt import adapt
from samples import GATED, make_samples
from tiny import save_tiny

RECIPES = Path(__file__).parents[2] / "recipes"
CUT = runpy.run_path(str(RECIPES / "cut_adapter.py"))
ROUND = runpy.run_path(str(RECIPES / "round_adapter.py"))
MASK = 54  # the row behind the tokenizer's last
CONVERSATIONS = [
    [{"role": "user", "content": f"what is {n} and {n + 1}?"}, {"role": "assistant", "content": f"it is {2 * n + 1}."}]
    for n in range(6)
]
DRAFTS = replace(GATED, learning_rate=3e-2)
EVERYWHERE = replace(DRAFTS, gated_lora=False, objective="ar")


@pytest.fixture(params=[EVERYWHERE, DRAFTS], ids=["everywhere", "gated"])
def adapter(request, tmp_path):
    base = save_tiny(tmp_path / "base", adapted=False, architecture="llama")
    adapt(base, make_samples(), request.param, tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(directory):
    checkpoint = load_checkpoint(directory)
    assert checkpoint.config.mask_token_id in (MASK, None)
    ids = torch.arange(4, 28)[None]
    ids[0, 12:] = MASK
    with torch.no_grad():
        return checkpoint.model(ids).logits


def numbers(directory):
    with safe_open(directory / "adapter_model.safetensors", framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys() if "lora_" in name)  # noqa: SIM118


def test_in_8_bit_floats_it_is_the_adapter_but_for_rounding(adapter, tmp_path):
    ROUND["main"](adapter, tmp_path / "small")
    sizes = [(directory / "adapter_model.safetensors").stat().st_size for directory in (adapter, tmp_path / "small")]
    assert sizes[1] < 0.7 * sizes[0]
    plain, whole, small = (logits(tmp_path / name) for name in ("base", "adapter", "small"))
    assert 0 < (small - whole).norm() < 0.06 * (whole - plain).norm()


def test_cut_to_all_its_numbers_it_is_the_adapter(adapter, tmp_path):
    CUT["main"](adapter, tmp_path / "cut", numbers(adapter), CONVERSATIONS)
    assert numbers(tmp_path / "cut") == numbers(adapter)
    torch.testing.assert_close(logits(tmp_path / "cut"), logits(adapter), atol=1e-4, rtol=1e-4)


def test_cut_to_half_it_is_nearer_to_the_adapter_than_to_none(adapter, tmp_path):
    CUT["main"](adapter, tmp_path / "cut", numbers(adapter) // 2, CONVERSATIONS)
    assert numbers(tmp_path / "cut") <= numbers(adapter) // 2
    with pytest.raises(SystemExit, match="have ranks of their own already"):
        CUT["main"](tmp_path / "cut", tmp_path / "again", numbers(adapter) // 3, CONVERSATIONS)
    ROUND["main"](tmp_path / "cut", tmp_path / "small")
    patterns = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert len(set(patterns["rank_pattern"].values())) > 1
    plain, whole, cut, small = (logits(tmp_path / name) for name in ("base", "adapter", "cut", "small"))
    assert 0 < (cut - whole).norm() < 0.5 * (whole - plain).norm()
    assert 0 < (small - cut).norm() < 0.1 * (whole - plain).norm()


@pytest.mark.parametrize("small", [False, True], ids=["as trained", "cut and rounded"])
def test_cut_with_what_is_beneath_it_is_both_over_the_base_of_both(small, tmp_path):
    base = save_tiny(tmp_path / "base", adapted=False, architecture="llama")
    adapt(base, make_samples(), EVERYWHERE, tmp_path / "first")
    beneath = tmp_path / "first"
    if small:
        CUT["main"](tmp_path / "first", tmp_path / "half", numbers(beneath) // 2, CONVERSATIONS)
        ROUND["main"](tmp_path / "half", tmp_path / "small")
        beneath = tmp_path / "small"
    # Over the merged model: an adapter that is given as a directory would itself be trained on.
    save_checkpoint(load_checkpoint(beneath), tmp_path / "merged")
    adapt(tmp_path / "merged", make_samples(), replace(EVERYWHERE, seed=1), tmp_path / "second")
    both = numbers(beneath) + numbers(tmp_path / "second")
    CUT["main"](tmp_path / "second", tmp_path / "cut", both, CONVERSATIONS, beneath)
    assert numbers(tmp_path / "cut") == both
    assert load_checkpoint(tmp_path / "cut").base == load_checkpoint(beneath).base == str(base)
    torch.testing.assert_close(logits(tmp_path / "cut"), logits(tmp_path / "second"), atol=1e-4, rtol=1e-4)
    assert (logits(tmp_path / "cut") - logits(beneath)).abs().max() > 1e-2


def test_no_other_cut_to_as_many_ranks_is_nearer_on_the_inputs_it_was_made_for():
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(12, 6, generator=generator), torch.randn(6, 10, generator=generator)
    x = torch.randn(200, 10, generator=generator) * torch.linspace(0.1, 4, 10)
    ranks = CUT["by_size"](up, down, (x.T @ x / len(x)).double())
    product = (up @ down).double()

    def error(cut):
        return float(((product - cut) @ x.T.double()).norm() / len(x) ** 0.5)

    u, s, v = torch.linalg.svd(product)
    for count in range(1, 6):
        kept = ranks.up[:, :count] @ torch.diag(ranks.sizes[:count]) @ ranks.down[:count]
        assert error(kept) == pytest.approx(float(ranks.sizes[count:].norm()), rel=1e-2)
        assert error(kept) < error(u[:, :count] @ torch.diag(s[:count]) @ v[:count])
    a, b = CUT["matrices"](ranks, 6)
    torch.testing.assert_close(b @ a, up @ down, atol=1e-4, rtol=1e-4)


def test_ranks_of_very_different_size_are_mixed():
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.linalg.qr(torch.randn(16, 8, generator=generator).double())[0] for _ in range(2))
    ranks = CUT["Ranks"](up, torch.logspace(0, -4, 8).double(), down.T)
    a, b = CUT["matrices"](ranks, 8)
    torch.testing.assert_close(b @ a, (up * ranks.sizes @ down.T).float(), atol=1e-5, rtol=1e-5)
    assert a.norm(dim=1).max() < 10 * a.norm(dim=1).min()  # 100 times, unmixed
