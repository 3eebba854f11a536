"""`run_demo`: adapt live, answer side by side, write the report."""

from pathlib import Path
from typing import Any

from rich.console import Console

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.data.tasks import RESERVED_TEST_ITEMS, make_items
from fast_dllm.demo.compare import DECODING, compare, print_totals, totals
from fast_dllm.demo.live import adapt_live
from fast_dllm.demo.report import write_report
from fast_dllm.errors import FastDLLMError
from fast_dllm.evaluation.box import EASY_TASKS, unseen_questions
from fast_dllm.machine import provenance
from fast_dllm.progress import busy

_LIVE_TRAINING = 2000


def run_demo(
    *,
    model: str = "smollm2",
    out: Path,
    minutes: float = 3.0,
    questions: int = 12,
    adapt: bool = True,
    console: Console,
    base: str = "smollm2-base",
) -> dict[str, Any]:
    """Show on this machine what block diffusion is: adapt, decode, report.

    An autoregressive model is adapted live for some minutes; then an adapted model answers held-out questions one
    token at a time and in blocks. `out` gets adapter/, report.html and report.json.

    Args:
        model: the adapted model that answers.
        out: output directory; an interrupted demo with the same settings goes on in it.
        minutes: of live adaptation.
        questions: to ask.
        adapt: whether to adapt live.
        console: where progress and tables go.
        base: what is adapted live.

    Returns:
        The report, as in report.json.

    Raises:
        FastDLLMError: for settings that cannot be met, or models that cannot be used.
    """
    if not 1 <= questions < RESERVED_TEST_ITEMS:
        raise FastDLLMError(f"questions={questions}: must be from 1 to {RESERVED_TEST_ITEMS - 1}")
    if not minutes > 0:
        raise FastDLLMError(f"minutes={minutes:g}: must be above 0; to leave the live adaptation out, turn it off")
    console.rule("1. Load an adapted model")
    with busy(console, f"Loading {model}"):
        answering = _load(model)
        *test, warm_up = unseen_questions(EASY_TASKS, RESERVED_TEST_ITEMS, answering.checkpoint.trained_on)
    console.print(answering.checkpoint.origin, markup=False)
    live = None
    if adapt:
        console.rule("2. Adapt an autoregressive model, live")
        asked = {item.question for item in (*test, warm_up)}
        train = make_items(EASY_TASKS, _LIVE_TRAINING, seed=0, exclude=asked)
        live = adapt_live(base, train, test, minutes, out, console)
        _print_live(live, console)
    console.rule("3. Held-out questions, both ways")
    pairs = compare(answering, test[:questions], warm_up, console)
    report = {
        **totals(pairs),
        "settings": _settings(answering),
        **provenance(),
        "live_adaptation": live,
        "questions": [pair.to_dict() for pair in pairs],
        "model": answering.checkpoint.origin,
    }
    print_totals(report, console)
    page = write_report(report, out)
    console.print(f"Report: {page.resolve()}", markup=False)
    return report


def _load(model: str) -> BlockDiffusionLM:
    loaded = BlockDiffusionLM.from_pretrained(model)
    if loaded.config.mask_token_id is None or loaded.config.block_size == 1:
        raise FastDLLMError(f"{model}: an autoregressive model; the demo needs an adapted one (fast-dllm adapt)")
    if loaded.config.context_attention == "full":
        raise FastDLLMError(f"{model}: a full-attention model has no autoregressive mode to compare with")
    if loaded.tokenizer is None:
        raise FastDLLMError(f"{model}: no tokenizer; the demo asks its questions as text")
    return loaded


def _print_live(live: dict[str, Any], console: Console) -> None:
    steps = "1 step" if live["steps"] == 1 else f"{live['steps']} steps"
    console.print(
        f"Held-out loss [bold]{live['loss_before']:.2f} → {live['loss_after']:.2f}[/bold] nats per token, by "
        f"{steps} on {live['response_tokens']:,} response tokens in {live['seconds'] / 60:.1f} minutes"
    )


def _settings(model: BlockDiffusionLM) -> dict[str, Any]:
    return {
        **{
            mode: {**decoding.to_dict(), "threshold": decoding.threshold_on(model.config)}
            for mode, decoding in DECODING.items()
        },
        "block_size": model.config.block_size,
        "device": str(model.checkpoint.model.device),
        "dtype": str(model.checkpoint.model.dtype).removeprefix("torch."),
    }
