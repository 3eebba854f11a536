"""The live part: adapt an autoregressive model to block diffusion for a few minutes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from fast_dllm.checkpoint import load_checkpoint
from fast_dllm.checkpoint.load import SMOLLM2_BASE
from fast_dllm.data.chat import Sample, render_chat
from fast_dllm.data.tasks import Item
from fast_dllm.errors import FastDLLMError
from fast_dllm.files import write_whole
from fast_dllm.progress import busy
from fast_dllm.training.adapt import AdaptResult, adapt
from fast_dllm.training.options import AdaptOptions

# A special token that SmolLM2's chat model never uses, so that its embedding keeps its size.
_SMOLLM2_MASK = "<reponame>"


def live_options(base: str, minutes: float) -> AdaptOptions:
    """The recipe of the live run: LoRA, a constant rate, as many steps as the minutes hold."""
    return AdaptOptions(
        steps=10_000,
        max_minutes=minutes,
        schedule="constant",
        warmup_steps=2,
        learning_rate=1e-3,
        lora_rank=16,
        batch_size=8,
        max_length=512,
        mask_token=_SMOLLM2_MASK if base == SMOLLM2_BASE else None,
        dtype="auto",
        save_every=5,
        eval_samples=16,
    )


def adapt_live(
    base: str, train: Sequence[Item], held_out: Sequence[Item], minutes: float, out: Path, console: Console
) -> dict[str, Any]:
    """Adapt `base` for some minutes, or go on where an earlier call was interrupted.

    Args:
        base: an autoregressive model.
        train: items to learn.
        held_out: items whose loss is measured before and after.
        minutes: of training, over all calls.
        out: the adapter goes to `out`/adapter.
        console: for progress.

    Returns:
        What the report says of it: losses, steps, seconds, response tokens and the log.

    Raises:
        FastDLLMError: when the base cannot be used, or `out` holds a run with other settings.
    """
    options = live_options(base, minutes)
    record = out / "adaptation.json"
    asked = {"base": base, "options": options.to_dict()}
    done = _read_record(record, asked) if (out / "adapter").exists() else None
    if done is not None:
        console.print(f"The live adaptation in {out / 'adapter'} is finished; not trained again.")
        return done
    if (out / "adapter.run" / "log.jsonl").exists():
        console.print("Going on with the live adaptation that was begun.")
    samples, held_out_samples = _render(base, train, held_out, console)
    try:
        # The bar shows the training alone; loading and measuring take their time too.
        with busy(console, f"Held-out loss, {minutes:g} minutes of training, held-out loss again"):
            result = adapt(base, samples, options, out / "adapter", held_out=held_out_samples, console=console)
    except KeyboardInterrupt:
        console.show_cursor()
        console.print("Interrupted. The same command goes on from the last save.")
        raise
    live = {**asked, **_outcome(result, out / "adapter.run" / "log.jsonl")}
    write_whole(record, json.dumps(live, indent=2))
    return live


def _read_record(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FastDLLMError(f"{path}: cannot be read; remove it, or choose another output directory") from error
    return record if {key: record.get(key) for key in asked} == asked else None


def _render(
    base: str, train: Sequence[Item], held_out: Sequence[Item], console: Console
) -> tuple[list[Sample], list[Sample]]:
    with busy(console, f"Loading {base} for its tokenizer"):
        tokenizer = load_checkpoint(base).tokenizer
    if tokenizer is None:
        raise FastDLLMError(f"{base}: no tokenizer; choose a base that has one")
    return (
        [render_chat(tokenizer, item.messages()) for item in train],
        [render_chat(tokenizer, item.messages()) for item in held_out],
    )


def _outcome(result: AdaptResult, log_path: Path) -> dict[str, Any]:
    kept = ("step", "loss", "tokens_per_s", "response_tokens", "elapsed_s")
    entries = [json.loads(line) for line in log_path.read_text(encoding="utf-8").splitlines()]
    log = [{key: entry.get(key) for key in kept} for entry in entries if "loss" in entry]
    return {
        "loss_before": result.loss_before,
        "loss_after": result.loss_after,
        "steps": result.steps,
        "seconds": log[-1]["elapsed_s"] if log else 0.0,
        "response_tokens": sum(entry["response_tokens"] or 0 for entry in log),
        "log": log,
    }
