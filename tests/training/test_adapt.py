"""Runs of `adapt` on tiny models: resuming, accumulation, phases, what is saved."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import TrainerControl, TrainerState, TrainingArguments

from fast_dllm.checkpoint import load_checkpoint
from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.data.chat import Sample
from fast_dllm.errors import FastDLLMError
from fast_dllm.training import adapt as adapt_module
from fast_dllm.training.adapt import adapt
from fast_dllm.training.callbacks import Watchdog
from fast_dllm.training.evaluation import ProbeItem
from fast_dllm.training.lora import wrap_with_lora
from fast_dllm.training.trainer import BlockDiffusionTrainer
from interrupted import adapt_up_to
from samples import GATED, make_samples, stream_samples
from samples import SHORT as OPTIONS
from tiny import save_tiny


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(save_tiny(tmp_path / "base", adapted=False, architecture="llama"))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(directory).model.state_dict()


def assert_same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(base, tmp_path, step, lora_rank):
    options = replace(OPTIONS, lora_rank=lora_rank)
    adapt(base, make_samples(), options, tmp_path / "whole")
    adapt_up_to(step, base, options, tmp_path / "resumed")
    result = adapt(base, make_samples(), options, tmp_path / "resumed")
    assert result.steps == 6
    assert_same(tmp_path / "whole", tmp_path / "resumed")


def test_a_half_written_save_is_not_resumed_from(base, tmp_path):
    adapt(base, make_samples(), OPTIONS, tmp_path / "whole")
    adapt(base, make_samples(), OPTIONS, tmp_path / "again")
    newest = max((tmp_path / "again.run").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    (newest / "trainer_state.json").write_text('{"global_st')
    adapt(base, make_samples(), OPTIONS, tmp_path / "again")
    assert_same(tmp_path / "whole", tmp_path / "again")


def test_a_save_of_a_run_asks_no_hub_what_its_base_was(base, tmp_path, monkeypatch):
    def ask(*_):
        raise AssertionError("a save went to the network")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", ask)
    checkpoint = load_checkpoint(base)
    checkpoint.model.name_or_path = "someone/a-model"
    wrap_with_lora(checkpoint.model, 4, OPTIONS, None).save_pretrained(tmp_path / "save")
    with safe_open(tmp_path / "save" / "adapter_model.safetensors", framework="pt") as file:
        assert [file.get_slice(name).get_shape()[0] for name in file.keys() if "embed" in name] == [1]  # noqa: SIM118


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("samples", [make_samples(), stream_samples], ids=["memory", "stream"])
@pytest.mark.parametrize(("batch", "accumulation"), [(1, 8), (2, 4)])
def test_accumulation_does_not_change_the_updates(base, tmp_path, batch, accumulation, samples):
    options = replace(OPTIONS, steps=20, learning_rate=1e-3, lora_rank=0)
    adapt(base, samples, replace(options, batch_size=8), tmp_path / "wide")
    in_parts = replace(options, batch_size=batch, accumulation=accumulation)
    adapt(base, samples, in_parts, tmp_path / "parts")
    # float64 would be exact; in float32 the order of the sums differs.
    assert losses(tmp_path / "wide.run") == pytest.approx(losses(tmp_path / "parts.run"), abs=1e-5)


def test_one_adapter_goes_through_both_phases(base, tmp_path):
    ar = replace(OPTIONS, objective="ar")
    first = adapt(base, make_samples(), ar, tmp_path / "ar", held_out=make_samples())
    diffusion = replace(OPTIONS, context_attention="causal", ar_weight=0.5)
    second = adapt(tmp_path / "ar", make_samples(), diffusion, tmp_path / "both", held_out=make_samples())
    assert first.loss_after < first.loss_before
    assert second.loss_after < second.loss_before
    checkpoint = load_checkpoint(tmp_path / "both")
    mask = checkpoint.config.mask_token_id
    assert checkpoint.config == BlockDiffusionConfig(mask_token_id=mask, block_size=8, context_attention="causal")
    record = json.loads((tmp_path / "both" / "block_diffusion.json").read_text())
    assert record["base"] == str(base)


def test_an_adapter_that_added_a_row_to_the_vocabulary_is_trained_on(tmp_path):
    base = save_tiny(tmp_path / "base", adapted=False, vocab_size=54)  # as many as the tokenizer has
    adapt(base, make_samples(), OPTIONS, tmp_path / "first")
    adapt(tmp_path / "first", make_samples(), OPTIONS, tmp_path / "second")
    assert load_checkpoint(tmp_path / "second").config.mask_token_id == 54
    # On top of merged weights the row is there, and trained.
    adapt(tmp_path / "second", make_samples(), GATED, tmp_path / "gated")
    assert json.loads((tmp_path / "gated" / "block_diffusion.json").read_text())["mask_token_added"] is False
    assert load_checkpoint(tmp_path / "gated").config.mask_token_id == 54


def test_only_the_mask_row_of_the_embedding_is_trained(base, tmp_path):
    adapt(base, make_samples(), replace(OPTIONS, mask_token="q"), tmp_path / "out")
    before, after = load_checkpoint(base), load_checkpoint(tmp_path / "out")
    mask = after.config.mask_token_id
    changed = (before.model.get_input_embeddings().weight != after.model.get_input_embeddings().weight).any(1)
    assert changed.nonzero().flatten().tolist() == [mask]


@pytest.mark.parametrize("wrong", [{"objective": "ar"}, {"ar_weight": 0.5, "context_attention": "causal"}])
def test_an_autoregressive_loss_needs_the_token_shift(wrong):
    with pytest.raises(FastDLLMError, match=r"^token_shift=False: .* leave token_shift on$"):
        replace(OPTIONS, token_shift=False, **wrong)


def test_other_settings_in_the_same_place_are_refused(base, tmp_path):
    adapt(base, make_samples(), OPTIONS, tmp_path / "out")
    with pytest.raises(FastDLLMError, match="other settings"):
        adapt(base, make_samples(), replace(OPTIONS, seed=3), tmp_path / "out")


def answering(sample: Sample, token: int) -> Sample:
    return replace(sample, input_ids=[*sample.input_ids[:-1], token])


@pytest.mark.parametrize("stream", [False, True])
def test_other_data_in_the_same_place_is_refused(base, tmp_path, stream):
    ours, theirs = make_samples(), make_samples()
    changed = 0 if stream else -1
    theirs[changed] = answering(theirs[changed], 3)
    options = replace(OPTIONS, stream=stream)
    adapt(base, (lambda epoch: ours) if stream else ours, options, tmp_path / "out")
    with pytest.raises(FastDLLMError, match=r"holds a run with other settings \(data\)"):
        adapt(base, (lambda epoch: theirs) if stream else theirs, options, tmp_path / "out")


def test_a_run_of_a_release_that_noted_less_goes_on(base, tmp_path):
    adapt(base, make_samples(), OPTIONS, tmp_path / "out")
    noted = tmp_path / "out.run" / "options.json"
    settings = json.loads(noted.read_text())
    noted.write_text(
        json.dumps({key: value for key, value in settings.items() if key not in ("data", "separate_documents")})
    )
    assert adapt(base, make_samples(), OPTIONS, tmp_path / "out").steps == 6
    assert json.loads(noted.read_text()) == settings


def test_prompts_may_hold_the_date(base, tmp_path):
    tomorrow = [replace(sample, input_ids=[7, *sample.input_ids[1:]]) for sample in make_samples()]
    adapt(base, make_samples(), OPTIONS, tmp_path / "out")
    assert adapt(base, tomorrow, OPTIONS, tmp_path / "out").steps == 6


def test_time_limit_ends_and_saves(base, tmp_path):
    options = replace(OPTIONS, steps=10_000, max_minutes=0.02, schedule="constant", save_every=1000)
    result = adapt(base, make_samples(), options, tmp_path / "out")
    assert 0 < result.steps < 10_000
    saved = weights(tmp_path / "out")
    again = adapt(base, make_samples(), options, tmp_path / "out")
    assert again.steps == result.steps  # its time is up already
    assert all(torch.equal(value, saved[name]) for name, value in weights(tmp_path / "out").items())


def test_nothing_to_learn_from_is_an_error(base, tmp_path):
    with pytest.raises(FastDLLMError, match="no sample"):
        adapt(base, [Sample(input_ids=[5, 6], loss_mask=[False, False])], OPTIONS, tmp_path / "out")


def test_the_log_tells_where_the_loss_is(base, tmp_path):
    options = replace(OPTIONS, context_attention="causal", ar_weight=0.5, eval_every=2, probe_items=2)
    result = adapt(base, make_samples(), options, tmp_path / "out", held_out=make_samples(4))
    lines = [json.loads(line) for line in (tmp_path / "out.run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    for line in steps:
        parts = [value for name, value in line.items() if name.startswith("loss_place_")]
        assert min(parts) <= line["loss"] - 0.5 * line["loss_ar"] <= max(parts)
    assert steps[-1]["response_tokens_seen"] == sum(line["response_tokens"] for line in steps)
    assert steps[0]["time_left_s"] > 0
    measured = {line["step"]: line for line in lines if "eval_loss" in line}
    assert list(measured) == [0, 2, 4, 6]
    assert (measured[0]["eval_loss"], measured[6]["eval_loss"]) == (result.loss_before, result.loss_after)
    assert all(line["eval_tokens_per_forward"] > 0 for line in measured.values())


@pytest.mark.parametrize("ratio", [None, 0.25, 1.0])
@pytest.mark.parametrize("complementary", [False, True])
def test_the_ar_weight_means_the_same_however_much_is_hidden(base, tmp_path, complementary, ratio):
    options = replace(OPTIONS, steps=1, batch_size=96, context_attention="causal", ar_weight=10.0)
    options = replace(options, complementary=complementary, mask_ratio=ratio)
    adapt(base, make_samples(96), options, tmp_path / "out")
    [step] = [json.loads(line) for line in (tmp_path / "out.run" / "log.jsonl").read_text().splitlines()][:1]
    diffusion = step["loss_ar"]  # of random weights about the same
    assert step["loss"] == pytest.approx(diffusion + 10 * step["loss_ar"], rel=0.1)


def test_a_probe_counts_right_answers(base, tmp_path):
    probe = [ProbeItem([5, 6, 7], lambda answer: True), ProbeItem([8, 9], lambda answer: False)]
    adapt(base, make_samples(), replace(OPTIONS, steps=1), tmp_path / "out", held_out=make_samples(2), probe=probe)
    lines = [json.loads(line) for line in (tmp_path / "out.run" / "log.jsonl").read_text().splitlines()]
    assert [line["eval_right"] for line in lines if "eval_loss" in line] == [0.5, 0.5]


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_bfloat16_run_measures_on_the_way(base, tmp_path, lora_rank):
    after = {}
    for dtype in ("float32", "bfloat16"):
        options = replace(OPTIONS, steps=2, dtype=dtype, lora_rank=lora_rank)
        after[dtype] = adapt(base, make_samples(), options, tmp_path / dtype, held_out=make_samples(2)).loss_after
    assert after["bfloat16"] == pytest.approx(after["float32"], abs=0.05)


def test_a_lost_loss_ends_the_run_and_keeps_the_last_save(base, tmp_path, monkeypatch):
    real = BlockDiffusionTrainer.compute_loss

    def lost(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step == 3 else loss

    monkeypatch.setattr(BlockDiffusionTrainer, "compute_loss", lost)
    with pytest.raises(FastDLLMError, match=r"step 4: the loss is nan; lower .*out\.run/checkpoint-2, the last good"):
        adapt(base, make_samples(), OPTIONS, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out.run").glob("checkpoint-*")] == ["checkpoint-2"]
    last = (tmp_path / "out.run" / "log.jsonl").read_text().splitlines()[-1]
    assert json.loads(last, parse_constant=pytest.fail)["loss"] is None


def test_a_diverging_loss_ends_the_run(base, tmp_path):
    # It learns while the rate is low, and loses that as the rate rises.
    options = replace(OPTIONS, steps=2000, warmup_steps=1000, learning_rate=1.0, lora_rank=0)
    with pytest.raises(FastDLLMError, match=r"the loss diverges: .* nats on average over 20 steps"):
        adapt(base, make_samples(), options, tmp_path / "out")


def test_steps_without_a_loss_are_no_measure_of_the_others(tmp_path):
    watchdog, arguments = Watchdog(1.5), TrainingArguments(output_dir=str(tmp_path))
    for loss in [0.0] * 20 + [2.0] * 20:
        watchdog.on_log(arguments, TrainerState(), TrainerControl(), {"loss": loss})


@pytest.mark.parametrize(("most_rise", "ends"), [(1.5, True), (10.5, False), (0.0, False)])
def test_a_loss_may_rise_as_far_as_is_said(most_rise, ends, tmp_path):
    watchdog, state, arguments = Watchdog(most_rise), TrainerState(), TrainingArguments(output_dir=str(tmp_path))

    def run():
        for loss in [2.0] * 20 + [5.0] * 20:
            watchdog.on_log(arguments, state, TrainerControl(), {"loss": loss})

    if ends:
        with pytest.raises(FastDLLMError, match="the loss diverges"):
            run()
    else:
        run()


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 0}, {"gated_lora": True, "context_attention": "causal"}])
def test_steps_at_which_nothing_is_hidden_are_trained_past(base, tmp_path, changes):
    options = replace(OPTIONS, steps=8, batch_size=1, complementary=False, mask_ratio=0.02, **changes)
    assert adapt(base, make_samples(), options, tmp_path / "out").steps == 8
    found = losses(tmp_path / "out.run")
    assert min(found) == 0 < max(found)


def test_of_several_gpus_without_a_launcher_one_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments = adapt_module._training_arguments(tmp_path, OPTIONS)
    assert not arguments.use_cpu
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 4


def test_the_log_goes_to_tensorboard(base, tmp_path):
    pytest.importorskip("tensorboard")
    adapt(base, make_samples(), replace(OPTIONS, steps=2, report_to="tensorboard"), tmp_path / "out")
    assert list((tmp_path / "out.run").rglob("events.out.tfevents.*"))


def test_a_block_that_8_does_not_divide_is_measured_on_the_way(base, tmp_path):
    options = replace(OPTIONS, steps=1, block_size=12, max_length=60, probe_items=1)
    assert adapt(base, make_samples(), options, tmp_path / "out", held_out=make_samples(2)).loss_after is not None


@pytest.mark.parametrize("stream", [False, True])
def test_a_sample_that_the_model_could_not_decode_is_refused_before_anything_is_written(tmp_path, stream):
    base = save_tiny(tmp_path / "short", adapted=False, architecture="llama", max_position_embeddings=24)
    samples = stream_samples if stream else make_samples()
    with pytest.raises(FastDLLMError, match="and the model 24 positions; give --max-length 24"):
        adapt(base, samples, replace(OPTIONS, stream=stream), tmp_path / "out")
    assert stream or not (tmp_path / "out.run").exists()


def test_a_whole_model_is_saved_in_the_dtype_it_came_in(tmp_path):
    base = save_tiny(tmp_path / "base", adapted=False, architecture="llama", dtype=torch.bfloat16)
    adapt(base, make_samples(), replace(OPTIONS, steps=2, lora_rank=0), tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").model.dtype == torch.bfloat16


def test_another_mask_token_than_the_one_it_was_adapted_with_is_refused(tmp_path):
    base = save_tiny(tmp_path / "adapted", adapted=True)
    with pytest.raises(FastDLLMError, match=r"was adapted with '\|<MASK>\|'"):
        adapt(base, make_samples(), replace(OPTIONS, mask_token="q"), tmp_path / "out")


def test_an_adapter_of_another_tool_is_merged_and_a_new_one_trained(base, tmp_path):
    """Its layers may be few, and it trains no row of the mask token."""
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    foreign = get_peft_model(load_checkpoint(base).model, config)
    foreign.save_pretrained(tmp_path / "foreign")
    values = json.loads((tmp_path / "foreign" / "adapter_config.json").read_text())
    (tmp_path / "foreign" / "adapter_config.json").write_text(
        json.dumps({**values, "base_model_name_or_path": str(base)})
    )
    adapt(tmp_path / "foreign", make_samples(), OPTIONS, tmp_path / "out")
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert any("down_proj" in name for name in names)
    assert any("token_adapter" in name for name in names)
    assert load_checkpoint(tmp_path / "out").base == str((tmp_path / "foreign").resolve())
