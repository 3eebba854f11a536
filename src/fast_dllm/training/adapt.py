"""`adapt`: an autoregressive model and samples in, an adapted checkpoint out."""

from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled, is_tensorboard_available, is_wandb_available
from transformers.trainer_utils import IntervalStrategy

from fast_dllm.checkpoint import (
    AUTOREGRESSIVE,
    Checkpoint,
    add_mask_token,
    complete_save,
    save_adapter,
    save_checkpoint,
)
from fast_dllm.checkpoint.directory import check_target
from fast_dllm.checkpoint.dtype import cast_weights
from fast_dllm.config import BlockDiffusionConfig, TaskItems
from fast_dllm.data.chat import Sample
from fast_dllm.errors import FastDLLMError
from fast_dllm.training.callbacks import ProgressBar, ProgressLines, RunClock, Watchdog
from fast_dllm.training.evaluation import Evaluation, ProbeItem, probe_from
from fast_dllm.training.lora import open_adapter, wrap_with_lora
from fast_dllm.training.memory import keep_freed_memory
from fast_dllm.training.options import AdaptOptions
from fast_dllm.training.quantised import quantise_linears
from fast_dllm.training.recompute import recompute_cheap_operations, recompute_layers
from fast_dllm.training.rows import Epochs, digest_of, no_longer_than, open_run, rows_of
from fast_dllm.training.run_directory import RunDirectory, step_of
from fast_dllm.training.schedule import RunDataset, StreamCollator
from fast_dllm.training.sharding import (
    NO_FSDP1,
    NO_SHARDED_LORA,
    add_up_as_one_process_does,
    check_save,
    gather,
    is_sharded,
)
from fast_dllm.training.trainer import BlockDiffusionTrainer, with_training_forward, without_training_forward


@dataclass(frozen=True)
class AdaptResult:
    """What a run came to.

    Attributes:
        directory: the adapted checkpoint (an adapter directory with LoRA, a full one without).
        loss_before: held-out loss in nats per response token before training; None without held-out samples.
        loss_after: and after.
        steps: optimizer updates made, over all resumptions.
        seconds: training time, over all resumptions.
    """

    directory: Path
    loss_before: float | None
    loss_after: float | None
    steps: int
    seconds: float


def adapt(
    source: str | Path,
    samples: Sequence[Sample] | Epochs,
    options: AdaptOptions,
    out: str | Path,
    *,
    held_out: Sequence[Sample] = (),
    probe: Sequence[ProbeItem] | None = None,
    console: Console | None = None,
    generated: TaskItems | None = None,
) -> AdaptResult:
    """Adapt a model to block diffusion (or fine-tune it autoregressively).

    An interrupted run goes on from its last save when called again with the same arguments. A source that is a
    LoRA adapter trained here is trained on: one adapter then goes through several phases. Under `torchrun` or
    `accelerate launch` every process calls this with the same arguments; the batch of an update is then
    `batch_size * accumulation * processes`, and the first process writes.

    Args:
        source: what `load_checkpoint` takes.
        samples: token ids and loss masks, cut to `options.max_length`; or what opens an epoch of them, for data that
            does not fit into memory (`data.stream.SampleStream.samples`). A resumed run reads such data again, up to
            where it was.
        options: the recipe.
        out: directory of the adapted checkpoint; the run's saves and `log.jsonl` are in `out`.run.
        held_out: samples whose loss is measured before, on the way and after.
        probe: prompts that are decoded then; None takes those of the first held-out samples.
        console: where progress goes, a bar on a terminal and else a line a minute; None shows none.
        generated: which of the samples are of `data.build.task_documents`; recorded, for `eval` to ask others.

    Raises:
        FastDLLMError: for an unusable source, nothing to train on, another run in `out`, or a loss lost on the way.
    """
    out, options = Path(out), with_dtype(options)
    run = RunDirectory(out.with_name(f"{out.name}.run"))
    arguments = _training_arguments(run.path, options)
    check_target(out)
    data, samples = digest_of(samples)
    model, checkpoint = _prepare(source, options, generated)
    samples = no_longer_than(samples, checkpoint.max_length, options)
    settings = {"source": str(source), "data": data, "processes": arguments.world_size, **options.to_dict()}
    run.claim(settings, {"data": data, "processes": 1, **AdaptOptions().to_dict()})
    per_update = options.batch_size * options.accumulation * arguments.world_size
    evaluation = _evaluation(held_out[: options.eval_samples], probe, checkpoint, options)
    resume = run.last_save()
    arguments.eval_on_start = evaluation is not None and resume is None
    clock = RunClock(run.log, options.max_minutes)
    arguments.max_steps = _steps_in_all(options, resume, clock)
    rows = RunDataset(open_run(samples, checkpoint.config, options, per_update), arguments.max_steps * per_update)
    progress = None if console is None else (ProgressBar if console.is_terminal else ProgressLines)(console)
    trainer = _make_trainer(model, arguments, rows, options, checkpoint, clock, evaluation, progress)
    check_save(trainer, resume)
    _read_up_to(0 if resume is None else step_of(resume) * per_update, rows, console)
    with nullcontext() if progress is None else closing(progress):
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        seconds = round(clock.elapsed(), 1)
        before, after = _held_out_losses(trainer)
    result = AdaptResult(out, before, after, steps=trainer.state.global_step, seconds=seconds)
    _save(trainer, checkpoint, options, result)
    return result


def with_dtype(options: AdaptOptions) -> AdaptOptions:
    """The options with the dtype of this machine in place of "auto".

    On a CPU without matrix units (AMX) bfloat16 products are slower than float32 ones.
    """
    if options.dtype != "auto":
        return options
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch release we admit
    is_fast = torch.accelerator.is_available() or bool(capabilities.get("amx_bf16", False))
    return replace(options, dtype="bfloat16" if is_fast else "float32")


def _collator(config: BlockDiffusionConfig, options: AdaptOptions) -> StreamCollator:
    return StreamCollator(
        config=config,
        complementary=options.complementary,
        with_ar=options.objective == "ar" or options.ar_weight > 0,
        with_diffusion=options.objective == "diffusion",
        seed=options.seed,
        mask_ratio=options.mask_ratio,
    )


def _evaluation(
    held_out: Sequence[Sample], probe: Sequence[ProbeItem] | None, checkpoint: Checkpoint, options: AdaptOptions
) -> Evaluation | None:
    if not held_out:
        return None
    chosen = probe_from(held_out, options.probe_items) if probe is None else probe
    return Evaluation(
        rows=rows_of(held_out, checkpoint.config, options),
        collator=_collator(checkpoint.config, options),
        batch_size=options.batch_size,
        bfloat16=options.dtype == "bfloat16",
        probe=chosen[: options.probe_items],
        stop_token_ids=checkpoint.stop_token_ids,
        max_length=checkpoint.max_length,
    )


def _make_trainer(
    model: Any,
    arguments: TrainingArguments,
    rows: RunDataset,
    options: AdaptOptions,
    checkpoint: Checkpoint,
    clock: RunClock,
    evaluation: Evaluation | None,
    progress: TrainerCallback | None,
) -> BlockDiffusionTrainer:
    if evaluation is not None and options.eval_every:
        arguments.eval_strategy, arguments.eval_steps = IntervalStrategy.STEPS, options.eval_every
    trainer = BlockDiffusionTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=None if evaluation is None else evaluation.rows,
        data_collator=_collator(checkpoint.config, options),
        callbacks=[
            clock,
            *([] if progress is None else [progress]),
            Watchdog(options.divergence * (1.0 + (options.ar_weight if options.hidden_share else 0.0))),
        ],
        block_size=options.block_size,
        ar_weight=options.ar_weight,
        hidden_share=options.hidden_share,
        clock=clock,
        evaluation=evaluation,
        complete=partial(complete_save, checkpoint=_trained(checkpoint, options)),
    )
    trainer.remove_callback(PrinterCallback)
    if is_sharded(trainer):
        if options.lora_rank:
            raise FastDLLMError(NO_SHARDED_LORA)
        if trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
            raise FastDLLMError(NO_FSDP1)
        add_up_as_one_process_does(trainer, bfloat16=options.dtype == "bfloat16")
    return trainer


def _prepare(source: str | Path, options: AdaptOptions, generated: TaskItems | None) -> tuple[Any, Checkpoint]:
    """The model to train, with its training forward, and the checkpoint it stems from."""
    torch.manual_seed(options.seed)
    if not torch.accelerator.is_available():
        keep_freed_memory()
    checkpoint, adapter = open_adapter(source, options)
    if generated is not None and generated not in checkpoint.trained_on:
        checkpoint.trained_on += (generated,)
    attention = "causal" if options.objective == "ar" else options.context_attention
    _choose_mask_token(checkpoint, options.mask_token)
    checkpoint.config = BlockDiffusionConfig(
        mask_token_id=checkpoint.config.mask_token_id,
        block_size=options.block_size,
        token_shift=options.token_shift,
        context_attention=attention,
    )
    if options.lora_base == "nf4":
        quantise_linears(checkpoint.model, torch.bfloat16 if options.dtype == "bfloat16" else torch.float32)
    model: Any = with_training_forward(checkpoint.model, attention)
    if options.gradient_checkpointing:
        recompute_layers(model)
    elif not options.lora_rank:
        recompute_cheap_operations(model)
    if options.lora_rank:
        model = wrap_with_lora(model, checkpoint.config.mask_token_id, options, adapter)
    return model, checkpoint


def _choose_mask_token(checkpoint: Checkpoint, token: str | None) -> None:
    tokenizer, known = checkpoint.tokenizer, checkpoint.config.mask_token_id
    if tokenizer is None:
        return
    if known is None:
        add_mask_token(checkpoint, token=token)
    elif token is not None and tokenizer.convert_tokens_to_ids(token) != known:
        name = tokenizer.convert_ids_to_tokens(known)
        raise FastDLLMError(f"mask_token={token!r}: the model was adapted with {name!r}; leave it out")


def _training_arguments(run: Path, options: AdaptOptions) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        warmup_steps=min(options.warmup_steps, options.steps // 2),
        lr_scheduler_type="linear" if options.schedule == "linear" else "constant_with_warmup",
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        bf16=options.dtype == "bfloat16",
        use_cpu=not torch.accelerator.is_available(),
        # The order of the dataset is the schedule: a pure function of the seed.
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        average_tokens_across_devices=True,
        logging_steps=1,
        save_steps=options.save_every,
        # Two, so that a save which is being written when the process dies leaves the one before it; the last good one
        # (`Watchdog`) is among them or stays besides.
        save_total_limit=2,
        seed=options.seed,
        report_to=_reporters(options),
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        # A loss that is no number is to end the run, not to be left out of the log.
        logging_nan_inf_filter=False,
    )
    if is_deepspeed_zero3_enabled():
        raise FastDLLMError(
            "DeepSpeed ZeRO-3 hides the weights from us; launch with recipes/fsdp2.yaml, or ZeRO-1 or 2"
        )
    # Without a launcher Trainer would take all GPUs by nn.DataParallel, which cuts every tensor along its first axis;
    # that of `tokens` and `read` is not the batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _steps_in_all(options: AdaptOptions, resume: Path | None, clock: RunClock) -> int:
    """Updates to end with: those that were made, where a resumed run is out of time. Trainer then trains nothing."""
    if resume is None:
        return options.steps
    save = TrainerState.load_from_json(str(resume / "trainer_state.json"))
    return step_of(resume) if clock.is_out_of_time(save) else options.steps


def _read_up_to(place: int, rows: RunDataset, console: Console | None) -> None:
    """Read data up to where the run goes on; what cannot be read is told before anything is measured."""
    if place == len(rows):
        return
    told = "reading again what was trained on"
    for earlier in track(range(place + 1), told, console=console, transient=True, disable=console is None or not place):
        rows[earlier]


def _reporters(options: AdaptOptions) -> list[str]:
    installed = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    name = options.report_to
    if name == "none":
        return []
    if not installed[name]():
        raise FastDLLMError(f"report_to={name!r}: {name} is not installed; run pip install {name}")
    return [name]


def _held_out_losses(trainer: BlockDiffusionTrainer) -> tuple[float | None, float | None]:
    """Before training, from the run's log, and now."""
    step = trainer.state.global_step
    losses: dict[int, float | None] = {}
    for log in trainer.state.log_history:
        if "eval_loss" in log:
            losses.setdefault(log["step"], log["eval_loss"])
    if step not in losses:
        losses[step] = trainer.evaluate().get("eval_loss")
    return losses.get(0), losses[step]


def _trained(checkpoint: Checkpoint, options: AdaptOptions) -> Checkpoint:
    """The checkpoint as it is to be decoded."""
    if options.objective != "ar":
        return checkpoint
    return replace(checkpoint, config=replace(AUTOREGRESSIVE, mask_token_id=checkpoint.config.mask_token_id))


def _save(trainer: BlockDiffusionTrainer, checkpoint: Checkpoint, options: AdaptOptions, result: AdaptResult) -> None:
    checkpoint = _trained(checkpoint, options)
    recipe = {**options.to_dict(), "steps_done": result.steps, "seconds": result.seconds}
    recipe |= {"held_out_loss_before": result.loss_before, "held_out_loss_after": result.loss_after}
    model = gather(trainer) if is_sharded(trainer) else trainer.model
    base: PreTrainedModel = model.get_base_model() if options.lora_rank else model
    without_training_forward(base)
    if trainer.accelerator.is_main_process:
        if options.lora_rank:
            save_adapter(model, result.directory, checkpoint=checkpoint, recipe=recipe)
        else:
            checkpoint.model = cast_weights(base, checkpoint.stored_dtype or base.dtype)
            save_checkpoint(checkpoint, result.directory, recipe=recipe)
    trainer.accelerator.wait_for_everyone()
