"""Where training data comes from: JSON lines, parquet, plain text, the Hugging Face hub.

A row that cannot be used is an error that names file and line, or is counted and left out.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from fast_dllm.data.rows import CHAT_ROW, Content, check_object, content_of, json_object
from fast_dllm.errors import FastDLLMError

_TEXT_SUFFIXES = (".txt", ".md")
_SUFFIXES = (".jsonl", ".json", ".parquet", *_TEXT_SUFFIXES)
_EXAMPLES = 5
_REMEMBERED = 100_000

_Raw = TypeVar("_Raw")
_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True)
class Document:
    """One row of a source.

    Attributes:
        content: a conversation, or plain text to continue.
        place: where it stands, such as "chats.jsonl:12".
    """

    content: Content
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One data set.

    Attributes:
        source: a file, or a hub name "owner/name" where there is no such file.
        weight: its share of what is drawn, relative to the other sources; None where shares are not asked for.
        subset: of a hub data set that has several.
        split: of a hub data set.
    """

    source: str
    weight: float | None = None
    subset: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        weight = self.weight
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if weight is not None and not (is_number and math.isfinite(weight) and weight > 0):
            raise FastDLLMError(f"{self.source}: weight={weight!r}: must be a number above 0")

    @property
    def is_hub_name(self) -> bool:
        """Whether `source` can only be the name of a hub data set."""
        path = Path(self.source)
        # A dot alone makes no file: teknium/OpenHermes-2.5.
        is_file = path.exists() or path.suffix.lower() in _SUFFIXES
        return not is_file and len(path.parts) == 2 and not path.is_absolute()


class BadRows:
    """What becomes of rows that cannot be used.

    Attributes:
        skip: leave them out; otherwise the first one is an error.
    """

    def __init__(self, *, skip: bool = False) -> None:
        """Nothing has been found yet."""
        self.skip = skip
        self._count = 0
        self._examples: list[str] = []
        self._places: set[str] = set()

    @property
    def count(self) -> int:
        """Rows left out. A row that is met again, in another epoch, counts once, if it was among the first 100,000."""
        return self._count

    @property
    def examples(self) -> list[str]:
        """What was wrong with the first of them."""
        return list(self._examples)

    def add(self, place: str, error: FastDLLMError) -> None:
        """Count a row.

        Raises:
            FastDLLMError: naming the row, when none may be left out.
        """
        if not self.skip:
            raise FastDLLMError(f"{place}: {error}") from error
        if place in self._places:
            return
        self._count += 1
        if len(self._places) < _REMEMBERED:  # a stream has no end
            self._places.add(place)
        if len(self._examples) < _EXAMPLES:
            self._examples.append(f"{place}: {error}")


def parse_sources(data: object) -> list[Source]:
    """The sources that a command line, a recipe or a caller names.

    Args:
        data: one or a list of: "FILE" or "owner/name", with ":WEIGHT" behind it if wanted; a mapping of `Source`'s
            fields; or the JSON of such a mapping or list.

    Raises:
        FastDLLMError: for anything else, or no source at all.
    """
    if isinstance(data, (str, Path)):
        text = str(data)
        return parse_sources(_parsed(text)) if text.lstrip().startswith(("{", "[")) else [_from_text(text)]
    if isinstance(data, Mapping):
        return [_from_mapping(data)]
    if not isinstance(data, Sequence) or not data:
        raise FastDLLMError(f"data={data!r}: must name a file or a hub data set, or be a list of these")
    return [source for part in data for source in parse_sources(part)]


def read_documents(source: Source, bad: BadRows, *, stream: bool = False) -> Iterator[Document]:
    """Read a source, row by row.

    A `.txt` or `.md` file is one text. A `.parquet` file and the hub are read by `datasets`. A `.json` file that is
    one array is read as its rows, every other file as JSON lines (UTF-8; blank lines are skipped). `content_of` says
    what a row may look like.

    Args:
        source: what to read.
        bad: told of every row that cannot be used.
        stream: take a hub data set as it comes, instead of downloading it first. Files are never held whole, but for
            plain text and JSON arrays.

    Raises:
        FastDLLMError: for a source that cannot be read or has no usable row, or as `bad` does.
    """
    path, found = Path(source.source), False
    if not source.is_hub_name and path.suffix.lower() in _TEXT_SUFFIXES:
        rows: Iterator[tuple[str, Content]] = usable(_text_file(path), _as_text, bad)
    else:
        rows = read_rows(source, content_of, bad, shape=CHAT_ROW, stream=stream)
    for place, content in rows:
        found = True
        yield Document(content, place)
    if not found:
        raise FastDLLMError(f"{source.source}: has no rows; each row must be {CHAT_ROW}")


def read_rows(
    source: Source, use: Callable[[Mapping[str, Any]], _Row], bad: BadRows, *, shape: str, stream: bool = False
) -> Iterator[tuple[str, _Row]]:
    """Read the objects of a source, as `read_documents` does what is no text.

    Args:
        source: what to read.
        use: makes of an object what is wanted; may refuse it.
        bad: told of every row that cannot be used.
        shape: what a row should look like, for the error.
        stream: take a hub data set as it comes.

    Returns:
        What `use` made, each with the place of its row.

    Raises:
        FastDLLMError: for a source that cannot be read, or as `bad` does.
    """
    path = Path(source.source)
    if source.is_hub_name or path.suffix.lower() == ".parquet":
        return usable(_loaded_rows(source, stream=stream), use, bad)
    if path.suffix.lower() == ".json" and _is_array(path):
        return usable(_array_rows(path), lambda row: use(check_object(row, f"write {shape}")), bad)
    return usable(_lines(path), lambda line: use(json_object(decode(line), shape)), bad)


def usable(rows: Iterable[tuple[str, _Raw]], use: Callable[[_Raw], _Row], bad: BadRows) -> Iterator[tuple[str, _Row]]:
    """The rows that can be used.

    Args:
        rows: with their places.
        use: makes of a row what is wanted; may refuse it.
        bad: told of every row that was refused.

    Returns:
        What `use` made, each with the place of its row.

    Raises:
        FastDLLMError: as `bad` does.
    """
    for place, raw in rows:
        try:
            row = use(raw)
        except FastDLLMError as error:
            bad.add(place, error)
            continue
        yield place, row


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of the lines that are not blank."""
    # Not text mode: its universal newlines, and str.splitlines, end lines where JSON does not.
    for number, line in enumerate(file, start=1):
        content = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip(b"\r\n")
        if content.strip():
            yield number, content


def decode(line: bytes) -> str:
    """A line as text.

    Raises:
        FastDLLMError: when it is not UTF-8.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FastDLLMError(f"not UTF-8 ({error.reason}); convert the file to UTF-8") from error


def open_file(path: Path) -> BinaryIO:
    """A file opened for reading.

    Raises:
        FastDLLMError: when it is missing, a directory, or not readable.
    """
    if path.is_dir():
        raise FastDLLMError(f"{path}: is a directory; name a file in it")
    if not path.exists():
        raise FastDLLMError(f"{path}: no such file; check the path")
    try:
        return path.open("rb")
    except OSError as error:
        raise FastDLLMError(f"{path}: cannot be read ({error.strerror})") from error


def one_line(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise FastDLLMError(f"data {text[:40]!r}: not JSON ({one_line(error)})") from error


def _from_text(text: str) -> Source:
    location, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Source(source=text)
    try:
        return Source(source=location, weight=float(weight))
    except ValueError:
        return Source(source=text)


def _from_mapping(values: Mapping[str, Any]) -> Source:
    known = [field.name for field in fields(Source)]
    for key in values:
        if key not in known:
            raise FastDLLMError(f"data: unknown key {key!r}; a source has {', '.join(known)}")
    for key in ("source", "subset", "split"):
        if key in values and not isinstance(values[key], str):
            raise FastDLLMError(f"data: {key}={values[key]!r}: must be a string")
    if "source" not in values:
        raise FastDLLMError('data: a source has no "source"; name its file or hub data set')
    return Source(**values)


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    with open_file(path) as file:
        for number, line in numbered_lines(file):
            yield f"{path}:{number}", line


def _text_file(path: Path) -> Iterator[tuple[str, bytes]]:
    with open_file(path) as file:
        content = file.read().removeprefix(b"\xef\xbb\xbf")
    if content.strip():
        yield str(path), content


def _as_text(content: bytes) -> str:
    return decode(content).replace("\r\n", "\n")


def _is_array(path: Path) -> bool:
    with open_file(path) as file:
        return next((line for _, line in numbered_lines(file)), b"").lstrip().startswith(b"[")


def _array_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with open_file(path) as file:
        content = file.read()
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FastDLLMError(f"{path}: not a JSON array ({one_line(error)}); write one row per line instead") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path} row:{number}", row


def _loaded_rows(source: Source, *, stream: bool) -> Iterator[tuple[str, Any]]:
    name = place = source.source
    if source.is_hub_name:  # two parts of one data set have rows of the same numbers
        place = " ".join(filter(None, (name, source.subset, source.split)))
    else:
        open_file(Path(name)).close()
    try:
        import datasets
    except ImportError as error:
        raise FastDLLMError(
            f"{name}: datasets is not installed; run pip install '.[train]' in fast-dllm's directory"
        ) from error
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs of an error, it raises too
    # datasets raises what its file systems and the network raise, and of a stream only while it is read.
    try:
        if source.is_hub_name:
            rows = datasets.load_dataset(name, source.subset, split=source.split, streaming=stream)
        else:
            rows = datasets.load_dataset("parquet", data_files=name, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{place} row:{number}", row
    except Exception as error:
        raise FastDLLMError(f"{name}: datasets cannot load it ({one_line(error)})") from error
