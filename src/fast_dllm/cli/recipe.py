"""A recipe file: the settings of `fast-dllm adapt`, written down."""

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, get_type_hints

from fast_dllm.cli.options import listed
from fast_dllm.errors import FastDLLMError
from fast_dllm.training.options import AdaptOptions

_OPTIONS = [field.name for field in fields(AdaptOptions)]
_SOURCES = ("model", "data", "skip_bad_rows", "tasks", "task_items")


@dataclass(frozen=True)
class Recipe:
    """What to train, on what, and how.

    Attributes:
        model: what `load_checkpoint` takes.
        data: what `data.sources.parse_sources` takes; None for tasks alone.
        tasks: names in `data.tasks.TASKS`; empty for data alone.
        task_items: training items, over all tasks.
        options: of the training.
        skip_bad_rows: leave out and count rows that cannot be used.
    """

    model: str
    data: object | None
    tasks: tuple[str, ...]
    task_items: int
    options: AdaptOptions
    skip_bad_rows: bool = False

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], *, needs_data: bool = True) -> Self:
        """Make the recipe from checked settings.

        Args:
            settings: of files and options.
            needs_data: refuse a recipe without.

        Raises:
            FastDLLMError: when the model or the data is missing, or an option is invalid.
        """
        model, data, tasks = (settings.get(name) for name in ("model", "data", "tasks"))
        if model is None:
            raise FastDLLMError("no model; give --model MODEL")
        if needs_data and not data and not tasks:
            raise FastDLLMError("no data; give --data chats.jsonl or --task NAME[,NAME...], or both")
        options = {name: value for name, value in settings.items() if name in _OPTIONS}
        items = settings.get("task_items", 8000)
        if not isinstance(items, int) or isinstance(items, bool) or items < 1:
            raise FastDLLMError(f"task_items={items!r}: must be an integer of 1 or more")
        skip = bool(settings.get("skip_bad_rows", False))
        return cls(model, data or None, tuple(tasks or ()), items, AdaptOptions(**options), skip)


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings in a recipe file: fields of `AdaptOptions`, and model, data, skip_bad_rows, tasks, task_items.

    Args:
        path: TOML when it is named `.toml`, else JSON.

    Raises:
        FastDLLMError: for a file that cannot be read, an unknown key, or a value of the wrong kind.
    """
    values = _read(path)
    for key in values:
        if key not in (*_OPTIONS, *_SOURCES):
            near = difflib.get_close_matches(key, [*_OPTIONS, *_SOURCES], n=1, cutoff=0.0)[0]
            raise FastDLLMError(f"{path}: unknown key {key!r}; the nearest known one is {near!r}")
    hints = get_type_hints(AdaptOptions)
    for key, value in values.items():
        if (hints.get(key) is bool or key == "skip_bad_rows") and not isinstance(value, bool):
            raise FastDLLMError(f"{path}: {key}={value!r}: must be true or false")
        if key in ("model", "mask_token", "base") and not isinstance(value, str):
            raise FastDLLMError(f"{path}: {key}={value!r}: must be a string")
    if "tasks" in values:
        values["tasks"] = _tasks(path, values["tasks"])
    return values


def _tasks(path: Path, value: Any) -> list[str]:
    if isinstance(value, str):
        return list(listed("task", value, str))
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise FastDLLMError(f"{path}: tasks={value!r}: must be a list of task names")
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FastDLLMError(f"{path}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    except OSError as error:
        raise FastDLLMError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    is_toml = path.suffix.lower() == ".toml"
    try:
        values = tomllib.loads(text) if is_toml else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FastDLLMError(f"{path}: not {'TOML' if is_toml else 'JSON'} ({error}); repair the file") from error
    if not isinstance(values, dict):
        raise FastDLLMError(f"{path}: a JSON {type(values).__name__}; a recipe is an object of settings")
    return values
