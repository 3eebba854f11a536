"""Command-line options made from the fields of the config classes, so that the two cannot differ."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from fast_dllm.config import ONE_AT_A_TIME, CacheDtype, DecodingConfig
from fast_dllm.errors import FastDLLMError

Mode = Literal["diffusion", "ar"]
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory, a LoRA adapter, a GGUF file, a hub id (owner/model), or smollm2.",
        show_default=False,
    ),
]
ModeOption = Annotated[
    Mode, typer.Option("--mode", help="diffusion: in blocks; ar: one token at a time, same weights and engine.")
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="STRING", help="End an answer before this text; may be given several times."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, bfloat16, float16 or int8 (the fastest on an x86 CPU); by default the stored one, of a "
        "GGUF file float32.",
    ),
]
CacheDtypeOption = Annotated[
    CacheDtype | None,
    typer.Option("--cache-dtype", help="Of K/V, on a CPU: int8 (the default with --dtype int8) or bfloat16."),
]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="Compile the torch path: seconds at first, CUDA graphs on a GPU.")
]
StoredDtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; the stored one by default.")
]
MaskOption = Annotated[
    int | None, typer.Option("--mask-token-id", help="For a checkpoint that does not name its mask token.")
]
BaseOption = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="Where a LoRA adapter's base is, if it moved.")
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="FILE[:WEIGHT]",
        help="Conversations or texts: JSONL, parquet, .txt, or a hub name (owner/name); may be given several times. "
        'JSON names more: {"source": ..., "subset": ..., "split": ..., "weight": ...}. WEIGHT is a share of the draws, '
        "which end when every source was given once: those with more of it repeat until then.",
    ),
]
SkipOption = Annotated[
    bool | None,
    typer.Option(
        "--skip-bad-rows/--refuse-bad-rows",
        help="Leave out and count rows that cannot be used; by default the first one is an error.",
        show_default=False,
    ),
]

_Value = TypeVar("_Value")
_Command = TypeVar("_Command", bound=Callable[..., Any])


def takes(
    config: type[Any], *, skip: Iterable[str] = (), defaults: Mapping[str, Any] | None = None
) -> Callable[[_Command], _Command]:
    """Give a command one option for each field of a config class, in place of its `**settings`.

    An option that is not given is None in `settings`. Type and help come from the class, the help from the
    "Attributes:" of its docstring.

    Args:
        config: a dataclass.
        skip: fields without an option.
        defaults: shown in the help instead of the fields' own.
    """
    own = {} if defaults is None else defaults
    hints, texts = get_type_hints(config), _attribute_texts(config)
    skipped = set(skip)
    options = [
        _option(field, hints[field.name], texts.get(field.name, ""), own.get(field.name, field.default))
        for field in fields(config)
        if field.name not in skipped
    ]

    def with_options(command: _Command) -> _Command:
        signature = inspect.signature(command)
        named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        command.__signature__ = signature.replace(parameters=[*named, *options])  # type: ignore[attr-defined]
        return command

    return with_options


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in settings.items() if value is not None}


def listed(name: str, text: str | None, kind: Callable[[str], _Value]) -> tuple[_Value, ...]:
    """The values in "VALUE,VALUE"; none for None.

    Args:
        name: of the option, for the error.
        text: as it was given.
        kind: makes a value of each part.

    Raises:
        FastDLLMError: for a part that is no such value.
    """
    parts = [] if text is None else [part.strip() for part in text.split(",") if part.strip()]
    try:
        return tuple(kind(part) for part in parts)
    except ValueError:
        raise FastDLLMError(f"--{name} {text}: must be numbers with commas between them") from None


def decoding_from_options(mode: Mode, stop: list[str] | None, settings: Mapping[str, Any]) -> DecodingConfig:
    """The `DecodingConfig` of a command line.

    Raises:
        FastDLLMError: for an invalid setting, or a block size in mode ar.
    """
    chosen = {"max_new_tokens": 256, **given(settings), "stop_strings": tuple(stop or ())}
    if mode == "ar":
        for name, size in ONE_AT_A_TIME.items():
            if chosen.setdefault(name, size) != size:
                raise FastDLLMError(f"{name}={chosen[name]}: --mode ar decodes one token at a time; leave it out")
    return DecodingConfig(**chosen)


def _option(field: "Field[Any]", hint: Any, text: str, default: Any) -> inspect.Parameter:
    flag = f"--{field.name.replace('_', '-')}"
    if hint in (bool, bool | None):
        flag = f"{flag}/--no-{flag[2:]}"
    shown = "" if default in (None, MISSING) else f" [default: {str(default).lower() if hint is bool else default}]"
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[hint | None, typer.Option(flag, help=f"{text}{shown}", show_default=False)],
    )


def _attribute_texts(config: type[Any]) -> dict[str, str]:
    """What a class's docstring says of each attribute, on one line."""
    section = inspect.getdoc(config) or ""
    section = section.partition("Attributes:\n")[2]
    found = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section, flags=re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in found}
