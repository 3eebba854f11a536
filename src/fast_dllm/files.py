"""Files that appear whole or not at all."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fast_dllm.errors import FastDLLMError


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file that appears under its name when all went well, or not at all.

    A device or pipe (/dev/null, /dev/stdout) is written to as it is.

    Raises:
        FastDLLMError: when it cannot be written.
    """
    target = path.resolve()
    is_device = path.exists() and not path.is_file()
    try:
        if is_device:
            file, temporary = path.open("w", encoding="utf-8"), None
        else:
            descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
            # mkstemp's files are private.
            os.chmod(name, 0o666 & ~umask())  # noqa: PTH101
            file, temporary = open(descriptor, "w", encoding="utf-8"), Path(name)  # noqa: PTH123, SIM115
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        with file:
            yield file
        if temporary is not None:
            temporary.replace(target)
    except OSError as error:
        # What happens inside is not all writing: a model's files are read there too.
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise unwritable(path, error) from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file, and the directories it is in, as `whole_file` does.

    Raises:
        FastDLLMError: when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error
    with whole_file(path) as file:
        file.write(text)


def unwritable(path: Path, error: OSError) -> FastDLLMError:
    """What to say of a file that cannot be written."""
    return FastDLLMError(f"{path}: cannot be written ({error.strerror}); choose another place")


def umask() -> int:
    """The mode bits that new files do not get; temporary files of `tempfile` are private whatever it says."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
