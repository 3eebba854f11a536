"""What a run shows and writes while it goes on."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RunClock(TrainerCallback):  # type: ignore[misc]
    """Adds elapsed seconds and tokens/s to the logs, writes them as JSON lines, and ends a run that is out of time.

    Elapsed time goes on where the resumed save left off: it is read from the logs that the save holds.
    """

    def __init__(self, path: Path, max_minutes: float | None) -> None:
        self._path = path
        self._limit = None if max_minutes is None else max_minutes * 60
        self._before = 0.0
        self._start = self._since = time.monotonic()
        self.response_tokens = 0
        """Response tokens trained since the last log line; the trainer counts them up."""

    def elapsed(self) -> float:
        """Seconds of training, over all resumptions."""
        return self._before + time.monotonic() - self._start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the clock and the log of the resumed save: lines of steps that are done again go."""
        if state.is_world_process_zero:
            self._path.write_text("".join(json.dumps(log) + "\n" for log in state.log_history))
        self._before = max((log.get("elapsed_s", 0.0) for log in state.log_history), default=0.0)
        self._start = self._since = time.monotonic()

    def stamp(self, logs: dict[str, Any]) -> None:
        """Add the time and the rate since the last log line."""
        now = time.monotonic()
        if self.response_tokens:
            logs["tokens_per_s"] = round(self.response_tokens / (now - self._since), 1)
            logs["response_tokens"] = self.response_tokens
        elapsed = self.elapsed()
        logs["elapsed_s"] = round(elapsed, 1)
        if self._limit is not None:
            logs["time_left_s"] = round(max(self._limit - elapsed, 0.0), 1)
        self._since, self.response_tokens = now, 0

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Append a line to the log."""
        if state.is_world_process_zero:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the run when its time is up; it is saved first."""
        if self._limit is not None and self.elapsed() >= self._limit:
            control.should_training_stop = control.should_save = True


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """A bar with loss, tokens/s and time left. It follows the steps, or the time where that is what will run out."""

    def __init__(self, console: Console, title: str) -> None:
        self._progress = Progress(
            TextColumn(title),
            BarColumn(),
            TextColumn("{task.fields[steps]}"),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(title, start=False, total=None, steps="", loss="-", rate="-")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the bar."""
        self._progress.start()
        self._progress.start_task(self._task)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Advance, and show the loss and the rate."""
        if "loss" not in logs:
            return
        done, total, steps = float(state.global_step), float(state.max_steps), f"{state.global_step}/{state.max_steps}"
        if "time_left_s" in logs:
            elapsed, limit = logs["elapsed_s"], logs["elapsed_s"] + logs["time_left_s"]
            if elapsed * total > limit * done:
                done, total, steps = elapsed, limit, f"step {state.global_step}"
        loss, rate = f"{float(logs['loss']):.3f}", f"{logs.get('tokens_per_s', 0):.0f}"
        self._progress.update(self._task, completed=done, total=total, steps=steps, loss=loss, rate=rate)

    def close(self) -> None:
        """Take the bar away; a bar left standing hides the cursor."""
        self._progress.stop()
