"""`adapt`: an autoregressive model and samples in, an adapted checkpoint out."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from fast_dllm.checkpoint import AUTOREGRESSIVE, Checkpoint, add_mask_token, save_adapter, save_checkpoint
from fast_dllm.checkpoint.directory import check_target
from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.data.chat import Sample
from fast_dllm.data.packing import Packed, pack
from fast_dllm.errors import FastDLLMError
from fast_dllm.training.callbacks import ProgressBar, RunClock
from fast_dllm.training.lora import open_adapter, wrap_with_lora
from fast_dllm.training.options import AdaptOptions
from fast_dllm.training.schedule import RunDataset, StreamCollator, run_order
from fast_dllm.training.trainer import BlockDiffusionTrainer, with_training_forward, without_training_forward

_SETTINGS = "options.json"


@dataclass(frozen=True)
class AdaptResult:
    """What a run came to.

    Attributes:
        directory: the adapted checkpoint (an adapter directory with LoRA, a full one without).
        loss_before: held-out loss in nats per response token before training; None without held-out samples.
        loss_after: and after.
        steps: optimizer updates made, over all resumptions.
        seconds: training time, over all resumptions.
        truncated: samples cut to `max_length`.
    """

    directory: Path
    loss_before: float | None
    loss_after: float | None
    steps: int
    seconds: float
    truncated: int


def adapt(
    source: str | Path,
    samples: Sequence[Sample],
    options: AdaptOptions,
    out: str | Path,
    *,
    held_out: Sequence[Sample] = (),
    console: Console | None = None,
) -> AdaptResult:
    """Adapt a model to block diffusion (or fine-tune it autoregressively).

    An interrupted run goes on from its last save when called again with the same arguments. A source that is a
    LoRA adapter trained here is trained on: one adapter then goes through several phases.

    Args:
        source: what `load_checkpoint` takes.
        samples: token ids and loss masks, cut to `options.max_length`.
        options: the recipe.
        out: directory of the adapted checkpoint; the run's saves and `log.jsonl` are in `out`.run.
        held_out: samples whose loss is measured before and after.
        console: where the progress bar goes; None shows none.

    Raises:
        FastDLLMError: when the source is unusable, there is nothing to train on, or `out` holds another run.
    """
    out = Path(out)
    if options.dtype == "auto":
        options = replace(options, dtype="bfloat16" if _has_fast_bfloat16() else "float32")
    run = out.with_name(f"{out.name}.run")
    settings = {"source": str(source), **options.to_dict()}
    _check_free(out, run, settings)
    model, checkpoint = _prepare(source, options)
    rows = _rows(samples, checkpoint.config, options)
    held_out_rows = _rows(held_out[: options.eval_samples], checkpoint.config, options) if held_out else []
    run.mkdir(parents=True, exist_ok=True)
    (run / _SETTINGS).write_text(json.dumps(settings, indent=2))
    clock = RunClock(run / "log.jsonl", options.max_minutes)
    bar = None if console is None else ProgressBar(console, "adapt")
    trainer = _make_trainer(model, checkpoint.config, rows, options, run, clock, [] if bar is None else [bar])
    before = _measure_before(run, trainer, held_out_rows, options)
    resume = _last_save(run)
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    finally:
        if bar is not None:
            bar.close()
    seconds = round(clock.elapsed(), 1)
    after = _held_out_loss(trainer, held_out_rows, options)
    result = AdaptResult(
        directory=out,
        loss_before=before,
        loss_after=after,
        steps=trainer.state.global_step,
        seconds=seconds,
        truncated=sum(sample.truncated for sample in samples),
    )
    _save(trainer.model, checkpoint, options, result)
    return result


def _has_fast_bfloat16() -> bool:
    """On a CPU without matrix units (AMX) bfloat16 products are slower than float32 ones."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch release we admit
    return torch.accelerator.is_available() or bool(capabilities.get("amx_bf16", False))


def _check_free(out: Path, run: Path, settings: dict[str, Any]) -> None:
    check_target(out)
    recorded = run / _SETTINGS
    if recorded.exists() and json.loads(recorded.read_text()) != settings:
        raise FastDLLMError(f"{run} holds a run with other settings; choose another output directory or remove it")


def _make_trainer(
    model: Any,
    config: BlockDiffusionConfig,
    rows: Sequence[Packed],
    options: AdaptOptions,
    run: Path,
    clock: RunClock,
    callbacks: Sequence[TrainerCallback],
) -> BlockDiffusionTrainer:
    collator = StreamCollator(
        config=config,
        complementary=options.complementary,
        with_ar=options.objective == "ar" or options.ar_weight > 0,
        with_diffusion=options.objective == "diffusion",
        seed=options.seed,
    )
    arguments = _training_arguments(run, options)
    per_update = options.batch_size * options.accumulation * arguments.world_size
    order = run_order([len(row.input_ids) for row in rows], options.steps * per_update, per_update, options.seed)
    views = 2 if options.complementary else 1
    trainer = BlockDiffusionTrainer(
        model=model,
        args=arguments,
        train_dataset=RunDataset(rows, order),
        data_collator=collator,
        callbacks=[clock, *callbacks],
        ar_weight=options.ar_weight,
        views=views if options.objective == "diffusion" else 0,
        clock=clock,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _prepare(source: str | Path, options: AdaptOptions) -> tuple[Any, Checkpoint]:
    """The model to train, with its training forward, and the checkpoint it stems from."""
    torch.manual_seed(options.seed)
    # A frozen base needs no float32 master copy; weights that are trained do.
    dtype = torch.bfloat16 if options.lora_rank and options.dtype == "bfloat16" else torch.float32
    checkpoint, adapter = open_adapter(source, dtype)
    attention = "causal" if options.objective == "ar" else options.context_attention
    if checkpoint.config.mask_token_id is None and checkpoint.tokenizer is not None:
        add_mask_token(checkpoint, token=options.mask_token)
    checkpoint.config = BlockDiffusionConfig(
        mask_token_id=checkpoint.config.mask_token_id,
        block_size=options.block_size,
        token_shift=options.token_shift,
        context_attention=attention,
    )
    model: Any = with_training_forward(checkpoint.model, attention)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options.lora_rank:
        model = wrap_with_lora(model, checkpoint.config.mask_token_id, options, adapter)
    return model, checkpoint


def _rows(samples: Sequence[Sample], config: BlockDiffusionConfig, options: AdaptOptions) -> list[Packed]:
    trainable = [sample for sample in samples if any(sample.loss_mask)]
    if not trainable:
        raise FastDLLMError("no sample has a response token to learn from; check the data's assistant turns")
    pad_id = config.mask_token_id or 0
    groups = [trainable] if options.pack else [[sample] for sample in trainable]
    return [
        row
        for group in groups
        for row in pack(
            group,
            length=options.max_length,
            block_size=config.block_size,
            pad_id=pad_id,
            pad_blocks=options.pad_to_block,
        )
    ]


def _training_arguments(run: Path, options: AdaptOptions) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(run),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        lr_scheduler_type="linear" if options.schedule == "linear" else "constant_with_warmup",
        weight_decay=options.weight_decay,
        bf16=options.dtype == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        # The order of the dataset is the schedule: a pure function of the seed.
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        logging_steps=1,
        save_steps=options.save_every,
        # Two, so that a save which is being written when the process dies leaves the one before it.
        save_total_limit=2,
        seed=options.seed,
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )


def _last_save(run: Path) -> Path | None:
    """The newest complete save. Trainer writes trainer_state.json last."""
    saves = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]), reverse=True)
    for save in saves:
        try:
            json.loads((save / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(save, ignore_errors=True)
            continue
        return save
    return None


def _measure_before(run: Path, trainer: Any, rows: Sequence[Packed], options: AdaptOptions) -> float | None:
    """Held-out loss of the untrained model, kept on disk for the runs that resume this one."""
    path = run / "loss_before.json"
    if not path.exists():
        path.write_text(json.dumps(_held_out_loss(trainer, rows, options)))
    loss: float | None = json.loads(path.read_text())
    return loss


@torch.no_grad()
def _held_out_loss(trainer: Any, rows: Sequence[Packed], options: AdaptOptions) -> float | None:
    """Mean loss of the objective in nats per response token, with the same noise every time."""
    if not rows:
        return None
    trainer.model.eval()
    # Of the diffusion objective alone, so that runs with and without an AR loss compare.
    own: StreamCollator = trainer.data_collator
    collator = replace(own, seed=options.seed + 1, with_ar=not own.with_diffusion)
    losses = []
    for start in range(0, len(rows), options.batch_size):
        batch = collator(list(enumerate(rows))[start : start + options.batch_size])
        batch = {key: value.to(trainer.model.device) for key, value in batch.items() if key != "labels"}
        with torch.autocast(trainer.model.device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            losses.append(trainer.model(**batch))
    return round(float(torch.cat(losses).mean()), 4)


def _save(model: Any, checkpoint: Checkpoint, options: AdaptOptions, result: AdaptResult) -> None:
    if options.objective == "ar":
        checkpoint.config = replace(AUTOREGRESSIVE, mask_token_id=checkpoint.config.mask_token_id)
    recipe = {**options.to_dict(), "steps_done": result.steps, "seconds": result.seconds}
    recipe |= {"held_out_loss_before": result.loss_before, "held_out_loss_after": result.loss_after}
    base: PreTrainedModel = model.get_base_model() if options.lora_rank else model
    without_training_forward(base)
    if options.lora_rank:
        save_adapter(model, result.directory, checkpoint=checkpoint, recipe=recipe)
    else:
        checkpoint.model = base
        save_checkpoint(checkpoint, result.directory, recipe=recipe)
