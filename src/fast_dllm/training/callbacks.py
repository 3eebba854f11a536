"""What a run shows and writes while it goes on, and what ends it early."""

import json
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fast_dllm.errors import FastDLLMError
from fast_dllm.training.sharding import shards_of


class RunClock(TrainerCallback):  # type: ignore[misc]
    """Adds time, tokens and rates to the logs, writes them as JSON lines, and ends a run that is out of time.

    Time and tokens go on where the resumed save left off: they are read from the logs that the save holds.
    """

    def __init__(self, path: Path, max_minutes: float | None) -> None:
        self._path = path
        self._limit = None if max_minutes is None else max_minutes * 60
        self._before = 0.0
        self._tokens_seen = 0
        self._start = self._since = time.monotonic()

    def elapsed(self) -> float:
        """Seconds of training, over all resumptions."""
        return self._before + time.monotonic() - self._start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training."""
        start = time.monotonic()
        yield
        pause = time.monotonic() - start
        self._start += pause
        self._since += pause

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the clock and the log of the resumed save: lines of steps that are done again go."""
        if state.is_world_process_zero:
            self._path.write_text("".join(map(_line, state.log_history)))
        self._before = _spent(state)
        self._tokens_seen = sum(log.get("response_tokens", 0) for log in state.log_history)
        self._start = self._since = time.monotonic()

    def stamp(self, logs: dict[str, Any], tokens: int, state: TrainerState) -> None:
        """Add the time, and the rate since the last log line.

        Args:
            logs: the line.
            tokens: response tokens since the last one, over all processes.
            state: of the run.
        """
        now = time.monotonic()
        elapsed = self.elapsed()
        if tokens:
            self._tokens_seen += tokens
            logs["tokens_per_s"] = round(tokens / (now - self._since), 1)
            logs["response_tokens"] = tokens
            logs["response_tokens_seen"] = self._tokens_seen
            self._since = now
        # Rounded up: of a run that is out of time the save must say so.
        logs["elapsed_s"] = math.ceil(elapsed * 10) / 10
        left = [] if self._limit is None else [self._limit - elapsed]
        if state.global_step:
            left.append(elapsed / state.global_step * (state.max_steps - state.global_step))
        if left:
            logs["time_left_s"] = round(max(min(left), 0.0), 1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Append a line to the log."""
        if state.is_world_process_zero:
            with self._path.open("a") as file:
                file.write(_line({"step": state.global_step, **logs}))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the run when its time is up; it is saved first."""
        if self._limit is None or not _any_process(self.elapsed() >= self._limit):
            return
        # The first process writes the log, and its own clock may be the slower one.
        self._before += max(self._limit - self.elapsed(), 0.0)
        control.should_training_stop = control.should_save = True

    def is_out_of_time(self, save: TrainerState) -> bool:
        """Whether the run that a save is of had used up its time."""
        return self._limit is not None and _spent(save) >= self._limit


def _line(log: dict[str, Any]) -> str:
    """A line of the log. JSON has no NaN: a number that is none is null."""
    values = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in log.items()
    }
    return json.dumps(values) + "\n"


def _spent(state: TrainerState) -> float:
    """Seconds of training that a save tells of."""
    return max((float(log.get("elapsed_s", 0.0)) for log in state.log_history), default=0.0)


def _any_process(flag: bool) -> bool:
    """Whether it is so for any process of the run: one that stops alone leaves the others waiting for its gradients."""
    here = PartialState()
    if here.num_processes == 1:
        return flag
    return bool(reduce(torch.tensor(float(flag), device=here.device), reduction="sum") > 0)


class Watchdog(TrainerCallback):  # type: ignore[misc]
    """Ends a run whose loss is lost, and keeps the last save from before it was.

    Lost is: not finite, or the mean of the last 20 steps is too far above the lowest one so far. A learning rate that
    is too high shows in this; a hard batch does not. A step is logged before it is saved, so no save holds what is not
    finite; a loss that rises slowly may be saved several times on its way.
    """

    _WINDOW = 20

    def __init__(self, most_rise: float) -> None:
        """Watch a loss.

        Args:
            most_rise: nats that the mean may be above its lowest; 0 allows any.
        """
        self._most_rise = most_rise or math.inf
        self._recent: deque[float] = deque(maxlen=self._WINDOW)
        self._mean, self._lowest = -math.inf, math.inf

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what the resumed save has seen."""
        self._recent.clear()
        self._mean, self._lowest = -math.inf, math.inf
        for log in state.log_history:
            if "loss" in log:
                self._add(float(log["loss"]))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Look at the loss and the gradient.

        Raises:
            FastDLLMError: when the loss is lost.
        """
        if "loss" not in logs:
            return
        loss, gradient = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        good = state.best_model_checkpoint
        go_on = "" if good is None else f" (--model {good}, the last good save, and another --out, go on from there)"
        if good is not None and (shards := shards_of(Path(good))) is not None:
            go_on = f" (`accelerate merge-weights {shards} DIR` makes weights of the last good save)"
        remedy = f"lower --learning-rate, or look at the data{go_on}"
        for name, value in (("loss", loss), ("gradient", gradient)):
            if not math.isfinite(value):
                raise FastDLLMError(f"step {state.global_step}: the {name} is {value}; {remedy}")
        self._add(loss)
        if self._mean > self._lowest + self._most_rise:
            raise FastDLLMError(
                f"step {state.global_step}: the loss diverges: {self._mean:.2f} nats on average over {self._WINDOW} "
                f"steps, after {self._lowest:.2f} (--divergence says how far it may); {remedy}"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the save as the best one, which Trainer does not delete, unless the loss is on its way up."""
        if not self._mean > self._lowest + self._most_rise / 4:
            state.best_model_checkpoint = str(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")

    def _add(self, loss: float) -> None:
        if loss != 0:  # nothing was hidden at that step: it says nothing
            self._recent.append(loss)
        if len(self._recent) == self._WINDOW:  # before that there is no mean
            self._mean = sum(self._recent) / self._WINDOW
            self._lowest = min(self._lowest, self._mean)


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """A bar with the losses, tokens/s and time left; each measurement on the way leaves a line above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("adapt"),
            BarColumn(),
            TextColumn("{task.fields[steps]}"),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("adapt", start=False, total=None, steps="", loss="-", rate="-")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self._progress.start()
        self._progress.start_task(self._task)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Advance, and show the losses and the rate."""
        if "eval_loss" in logs:
            self._console.print(measurement(state.global_step, logs), markup=False)
        if "loss" not in logs:
            return
        elapsed, left = float(logs["elapsed_s"]), float(logs.get("time_left_s", 0.0))
        self._progress.update(self._task, completed=elapsed, total=elapsed + left, **_fields(state, logs))

    def close(self) -> None:
        """Take the bar away; a bar left standing hides the cursor."""
        self._progress.stop()


class ProgressLines(TrainerCallback):  # type: ignore[misc]
    """What the bar shows, as lines for a log file: the first step, one step a minute, and each measurement."""

    _PAUSE = 60.0

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = 0.0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Print a line when one is due."""
        if "eval_loss" in logs:
            self._print(measurement(state.global_step, logs))
        if "loss" not in logs or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._PAUSE
        left = timedelta(seconds=round(float(logs.get("time_left_s", 0.0))))
        self._print("{steps}: loss {loss}, {rate} tokens/s, {left} left".format(**_fields(state, logs), left=left))

    def close(self) -> None:
        """Lines stay."""

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _fields(state: TrainerState, logs: dict[str, Any]) -> dict[str, Any]:
    """What is shown of a step's log."""
    loss = f"{float(logs['loss']):.3f}"
    if "loss_ar" in logs and len([name for name in logs if name.startswith("loss_")]) > 1:
        loss += f" (AR {logs['loss_ar']:.3f})"
    steps = f"step {state.global_step} of {state.max_steps}"
    return {"steps": steps, "loss": loss, "rate": f"{logs.get('tokens_per_s', 0):.0f}"}


def measurement(step: int, logs: dict[str, Any]) -> str:
    """One line on what `Evaluation` found."""
    line = f"step {step}: held-out loss {logs['eval_loss']:.3f}"
    if "eval_tokens_per_forward" in logs:
        line += f", {logs['eval_tokens_per_forward']:.2f} tokens per forward"
    if "eval_right" in logs:
        line += f", {logs['eval_right']:.0%} right"
    return line
