"""Directories that appear whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fast_dllm.checkpoint.checkpoint import CONFIG_KEY
from fast_dllm.errors import FastDLLMError
from fast_dllm.files import umask, unwritable

BLOCK_DIFFUSION_FILE = "block_diffusion.json"


@contextmanager
def whole_directory(directory: str | Path) -> Iterator[Path]:
    """A temporary sibling to write into; it takes the directory's name when all went well, else it is deleted.

    A checkpoint of ours that was there before is replaced in the end, and stays if anything fails.

    Raises:
        FastDLLMError: when the directory holds something that is not ours to overwrite, or cannot be written.
    """
    target = Path(directory).expanduser().resolve()
    _refuse_foreign(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise unwritable(target, error) from error
    try:
        temporary.chmod(0o777 & ~umask())  # mkdtemp's directories are private
        yield temporary
        _take_place(temporary, target)
    except OSError as error:
        raise FastDLLMError(f"{target}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(directory: str | Path) -> None:
    """See that `whole_directory` could write there, before hours of work that end in it.

    Raises:
        FastDLLMError: as `whole_directory`.
    """
    target = Path(directory).expanduser().resolve()
    _refuse_foreign(target)
    parent = next(place for place in target.parents if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise FastDLLMError(f"{target}: cannot be written ({parent} is not a writable directory); choose another place")


def _refuse_foreign(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise FastDLLMError(f"{target}: is a file; choose another name")
    if target.is_dir() and any(target.iterdir()) and not _is_ours(target):
        raise FastDLLMError(f"{target}: not empty and not a fast-dllm checkpoint; choose another name or empty it")


def _is_ours(target: Path) -> bool:
    if (target / BLOCK_DIFFUSION_FILE).exists():
        return True
    try:
        return CONFIG_KEY in json.loads((target / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _take_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    target.rename(old)  # onto an empty directory: allowed, and atomic
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
