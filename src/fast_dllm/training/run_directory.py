"""What a run keeps on disk so that it can go on: its settings, its log, its saves."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from fast_dllm.errors import FastDLLMError
from fast_dllm.files import write_whole

_FREE = (
    "data_workers",
    "divergence",
    "eval_every",
    "gradient_checkpointing",
    "max_minutes",
    "probe_items",
    "report_to",
    "save_every",
)
"""Settings that the weights do not depend on, but for rounding: a run may go on with others."""


class RunDirectory:
    """Directory of one run. Every process of the run sees it; the first one writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "log.jsonl"
        self._settings = path / "options.json"

    def claim(self, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        """Make the directory this run's, and take away saves that a killed process left unfinished.

        Args:
            settings: of the run; it goes on only with those it began with, as far as the weights depend on them. How
                an update is cut into forwards and spread over processes does not count, nor does what a run without a
                whole save had.
            defaults: what holds for a run of an earlier release, which did not know all of them.

        Raises:
            FastDLLMError: when it holds a run with other settings, or cannot be written.
        """
        recorded = self._recorded()
        if recorded is not None and any(map(_is_whole, self._saves())):
            before, now = _decisive({**defaults, **recorded}), _decisive(settings)
            if differing := [key for key in {**before, **now} if before.get(key) != now.get(key)]:
                raise FastDLLMError(
                    f"{self.path} holds a run with other settings ({', '.join(differing)}); choose another output "
                    "directory or remove it"
                )
        state = PartialState()
        state.wait_for_everyone()  # nobody writes before everybody has read
        if state.is_main_process:
            write_whole(self._settings, json.dumps(settings, indent=2))
            for save in self._saves():
                if not _is_whole(save):
                    shutil.rmtree(save, ignore_errors=True)
        state.wait_for_everyone()

    def last_save(self) -> Path | None:
        """The newest save, if there is one; every process must call it.

        It is what the first process finds: on another host a file system may still show a save that was taken away.
        """
        found: list[Path | None] = [max(self._saves(), key=step_of, default=None)]
        broadcast_object_list(found)
        return found[0]

    def _recorded(self) -> dict[str, Any] | None:
        try:
            values: dict[str, Any] = json.loads(self._settings.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise FastDLLMError(f"{self._settings}: cannot be read; remove {self.path}") from error
        return values

    def _saves(self) -> list[Path]:
        return list(self.path.glob("checkpoint-*"))


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in settings.items() if key not in _FREE}
    return kept | {"batch_size": kept["batch_size"] * kept.pop("accumulation") * kept.pop("processes")}


def step_of(save: Path) -> int:
    """The step after which a save was made."""
    return int(save.name.rsplit("-", 1)[1])


def _is_whole(save: Path) -> bool:
    """Trainer writes trainer_state.json last."""
    try:
        json.loads((save / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
