"""What a run keeps on disk so that it can go on: its settings, its log, its saves."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from fast_dllm.errors import FastDLLMError
from fast_dllm.files import write_whole


class RunDirectory:
    """Directory of one run. Every process of the run sees it; the first one writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path / "log.jsonl"
        self._settings = path / "options.json"

    def claim(self, settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        """Make the directory this run's, and take away saves that a killed process left unfinished.

        Args:
            settings: all that the weights depend on; a run goes on only with those it began with.
            defaults: what holds for a run of an earlier release, which did not know all of them.

        Raises:
            FastDLLMError: when it holds a run with other settings, or cannot be written.
        """
        recorded = self._recorded()
        if recorded is not None and (recorded := {**defaults, **recorded}) != settings:
            differing = ", ".join(key for key in {**recorded, **settings} if recorded.get(key) != settings.get(key))
            raise FastDLLMError(
                f"{self.path} holds a run with other settings ({differing}); choose another output directory or "
                "remove it"
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
        """The newest save, if there is one."""
        return max(self._saves(), key=step_of, default=None)

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
