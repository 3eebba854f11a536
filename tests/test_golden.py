"""Against what the published code computed on tiny random checkpoints, and against our own recorded subset."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fast_dllm.checkpoint import load_checkpoint
from fast_dllm.config import DecodingConfig
from fast_dllm.generation import decoding_from_call, generate_batch
from fast_dllm.masks import dense_mask, sequence_tokens
from fast_dllm.model.backbone import ForwardBatch, RowSpan
from fast_dllm.model.forward import head_logits, hidden_states
from fast_dllm.model.hf import HFBackbone
from fast_dllm.model.native import NativeBackbone
from fast_dllm.noise import draw_views
from fast_dllm.objective import lay_out
from fast_dllm.training.trainer import with_training_forward, without_training_forward
from golden_subset.make import SUBSET, recorded_cases, recorded_logits

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="the recorded data of the published code is not here")
both_models = pytest.mark.parametrize("name", ["model_a", "model_b"])


@cache
def golden_cases(name):
    return json.loads((GOLDEN / name / "cases.json").read_text())


@cache
def golden_tensors(name):
    return load_file(GOLDEN / name / "tensors.safetensors")


@cache
def golden_checkpoint(name):
    return load_checkpoint(GOLDEN / name, mask_token_id=golden_cases(name)["mask_id"])


def golden_backbone(name, kind):
    checkpoint = golden_checkpoint(name)
    return kind(checkpoint.model, checkpoint.config.context_attention, checkpoint.max_length)


both_backbones = pytest.mark.parametrize("kind", [HFBackbone, NativeBackbone])


def case_ids(key, wanted):
    """(model, id) of the recorded cases that hold no known fault of the published code."""
    if not GOLDEN.exists():
        return []
    names = ("model_a", "model_b")
    return [(name, number) for name in names for number, c in enumerate(golden_cases(name)[key]) if wanted(c)]


def settings_of(case, **changes):
    fields = ("max_new_tokens", "small_block_size", "threshold", "use_block_cache", "stop_token")
    return decoding_from_call(**{key: case[key] for key in fields} | changes, cache_refresh="published")


@needs_golden
@both_models
def test_logits_of_one_forward(name):
    tensors, model = golden_tensors(name), golden_checkpoint(name).model
    ids = tensors["eval70.input_ids"]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.inference_mode():
        hidden = hidden_states(model, ids, positions, dense_mask(sequence_tokens(positions, 32), "block"))
        torch.testing.assert_close(head_logits(model, hidden), tensors["eval70.logits"], atol=1e-3, rtol=1e-4)


@needs_golden
@both_models
@both_backbones
def test_logits_over_the_cache(name, kind):
    """Prefill, block, two sub-blocks and commit, one after another on one slot."""
    tensors, backbone = golden_tensors(name), golden_backbone(name, kind)
    slab = backbone.new_cache(1, 96)

    def logits(ids, start, end, *, noisy, rows):
        length = ids.shape[1]
        row = RowSpan(0, start, start + length, end, 64 if noisy else end, 32)
        batch = ForwardBatch.build([row], ids[0].tolist(), rows)
        return backbone.forward(batch, slab)

    def assert_close(ours, recorded):
        torch.testing.assert_close(ours, tensors[recorded][0].view_as(ours), atol=1e-3, rtol=1e-4)

    prefill = logits(tensors["cache.prefill_ids"], 0, 64, noisy=False, rows=[63])
    assert_close(prefill, "cache.prefill_logits_last")
    for layer, (keys, values) in enumerate(zip(slab.keys, slab.values, strict=True)):
        assert_close(keys[0, :, :64], f"cache.prefill_key.{layer}")
        assert_close(values[0, :, :64], f"cache.prefill_value.{layer}")
    block = logits(tensors["cache.block_ids"], 64, 96, noisy=True, rows=range(32))
    assert_close(block, "cache.block_logits")
    for start in (8, 16):
        sub = logits(tensors[f"cache.sub{start}_ids"], 64 + start, 96, noisy=True, rows=range(8))
        assert_close(sub, f"cache.sub{start}_logits")
    commit = logits(tensors["cache.commit_ids"], 64, 96, noisy=False, rows=[31])
    assert_close(commit, "cache.commit_logits_last")
    assert commit.argmax().item() == tensors["cache.commit_next_token"].item()


GENERATED = [
    *((name, "generate", n) for name, n in case_ids("generate", lambda c: c["prompt_len"] != 32)),
    *(
        (name, "generate_edge", n)
        for name, n in case_ids(
            "generate_edge", lambda c: c["prompt_len"] != 32 and not c["note"].startswith("0 blocks")
        )
    ),
]


@needs_golden
@pytest.mark.parametrize(("name", "key", "number"), GENERATED)
@both_backbones
def test_generated_ids_and_forwards(name, key, number, kind):
    case = golden_cases(name)[key][number]
    # The published code rounds its limit to blocks; ours is exact.
    changes = {"max_new_tokens": case["new_tokens"]} if case["finish"] == "length" else {}
    result = generate_batch(
        golden_backbone(name, kind), golden_checkpoint(name).config, [case["prompt_ids"]], settings_of(case, **changes)
    )
    assert result.sequences == [case["output_ids"]]
    assert result.finish == ["stop" if case["output_ids"][-1] == case["stop_token"] else "length"]
    theirs = case["forward"]
    calls, queries = ({kind: theirs[kind][count] for kind in theirs} for count in ("calls", "query_tokens"))
    for ours, recorded in (
        (result.total.forwards_by_kind, calls),
        (result.total.query_tokens_by_kind, queries),
    ):
        assert ours["prefill"] == recorded["prefill"]
        assert ours["block"] == recorded["full"] + recorded["block"]
        assert ours["sub_block"] == recorded["sub"]
        assert ours["commit"] <= recorded["commit"]


RAGGED = case_ids(
    "batch_sample",
    lambda c: 32 not in c["seq_len"] and not c["use_block_cache"] and not any(c["undetected_stop"]),
)


@needs_golden
@pytest.mark.parametrize(("name", "number"), RAGGED)
@both_backbones
def test_ids_of_ragged_batches(name, number, kind):
    case = golden_cases(name)["batch_sample"][number]
    prompts = [row[:length] for row, length in zip(case["input_ids"], case["seq_len"], strict=True)]
    recorded = [_without_padding(row, case["pad_token_id"]) for row in case["trimmed_rows"]]
    decodings = [
        settings_of(case, max_new_tokens=max(1, len(row) - len(prompt)))
        for row, prompt in zip(recorded, prompts, strict=True)
    ]
    result = generate_batch(golden_backbone(name, kind), golden_checkpoint(name).config, prompts, decodings)
    assert result.sequences == recorded


def _without_padding(row, pad):
    while row[-1] == pad:
        row = row[:-1]
    return row


TRAINED = case_ids("train", lambda _: True)


def training_case(name, number):
    case = golden_cases(name)["train"][number]
    prefix = case["tensor_prefix"]
    tensors = {key.removeprefix(prefix): t for key, t in golden_tensors(name).items() if key.startswith(prefix)}
    return case, tensors


@needs_golden
@pytest.mark.parametrize(("name", "number"), TRAINED)
def test_noise_of_the_recorded_seed(name, number):
    case, tensors = training_case(name, number)
    torch.manual_seed(case["seed"])
    views = draw_views(tensors["labels"] != -100, 32)
    mask_id = case["mask_id"]
    assert torch.equal(tensors["input_ids"].masked_fill(views[0], mask_id), tensors["noisy_input_ids"])
    assert torch.equal(tensors["input_ids"].masked_fill(views[1], mask_id), tensors["comp_input_ids"])
    every_position = draw_views(
        torch.ones_like(tensors["labels"], dtype=torch.bool), 32, torch.Generator().manual_seed(case["seed"])
    )
    assert torch.equal(every_position[0], tensors["mask_indices"].bool())


@needs_golden
@pytest.mark.parametrize(("name", "number"), TRAINED)
def test_training_losses_and_gradients(name, number):
    case, tensors = training_case(name, number)
    checkpoint = golden_checkpoint(name)
    loss_mask = tensors["labels"] != -100
    views = torch.stack([loss_mask & (tensors[f"{view}_input_ids"] == case["mask_id"]) for view in ("noisy", "comp")])
    streams = lay_out(tensors["input_ids"], loss_mask, views, checkpoint.config)
    model = with_training_forward(checkpoint.model, "block")
    try:
        losses = model(
            input_ids=streams.input_ids,
            position_ids=streams.position_ids,
            tokens=torch.stack(streams.tokens),
            read=streams.read,
            targets=streams.targets,
            is_ar=streams.is_ar,
        )
        losses.mean().backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    finally:
        model.zero_grad()
        without_training_forward(model)
    assert len(losses) == case["num_loss_tokens"]
    assert losses.mean().item() == pytest.approx(case["loss"], abs=1e-5)
    # Recorded at the position that predicts, per view and row.
    scored = views.clone()
    scored[..., 0] = False
    recorded = tensors["per_token_loss"].view(2, *loss_mask.shape).roll(1, dims=-1)[scored]
    torch.testing.assert_close(losses.detach(), recorded, atol=1e-4, rtol=1e-5)
    norms = {key: gradient.norm().item() for key, gradient in gradients.items()}
    assert norms == pytest.approx(case["grad_norms"], rel=1e-4)
    recorded_gradients = {key.removeprefix("grad."): t for key, t in tensors.items() if key.startswith("grad.")}
    assert recorded_gradients
    for key, expected in recorded_gradients.items():
        torch.testing.assert_close(gradients[key], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@cache
def subset():
    return load_checkpoint(SUBSET)


@pytest.mark.parametrize("case", recorded_cases(), ids=lambda case: case["id"])
def test_recorded_answers_of_the_reference_decoder(case):
    checkpoint = subset()
    config = replace(checkpoint.config, **case["model"])
    backbone = HFBackbone(checkpoint.model.double(), config.context_attention)
    settings = {**case["decoding"], "stop_token_ids": tuple(case["stop_token_ids"])}
    decoding = DecodingConfig.from_dict(settings | {"sub_block_cache": "none"})
    assert generate_batch(backbone, config, [case["prompt"]], [decoding]).answers == [case["answer"]]


@pytest.mark.parametrize("attention", ["block", "causal", "full"])
def test_recorded_logits_of_the_reference_decoder(attention):
    recorded = recorded_logits()
    checkpoint = subset()
    ids = recorded["ids"][None]
    positions = torch.arange(ids.shape[1])[None]
    tokens = sequence_tokens(positions, checkpoint.config.block_size)
    with torch.inference_mode():
        model = checkpoint.model.double()
        hidden = hidden_states(model, ids, positions, dense_mask(tokens, attention))
        ours = head_logits(model, hidden)[0].float()
    torch.testing.assert_close(ours, recorded[attention], atol=1e-4, rtol=1e-4)
