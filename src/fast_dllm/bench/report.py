"""What a run leaves: tables to read, one JSON object to check."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fast_dllm.bench.findings import BenchResult, Record
from fast_dllm.files import write_whole

Column = tuple[str, Callable[[Record], str]]


def to_json(result: BenchResult) -> str:
    """The result on one line."""
    return json.dumps(result.to_dict(), ensure_ascii=False)


def write_json(result: BenchResult, out: Path) -> Path:
    """Write `out`/bench.json.

    Raises:
        FastDLLMError: when it cannot be written.
    """
    path = out / "bench.json"
    write_whole(path, to_json(result) + "\n")
    return path


def print_result(result: BenchResult, console: Console) -> None:
    """Print the tables for people.

    Args:
        result: of a run.
        console: where to.
    """
    machine, model = result.about["machine"], result.about["model"]
    peaks = ", ".join(f"{dtype} {value:.0f}" for dtype, value in machine["matmul_gflop_per_s"].items())
    console.print(f"{model['name']}: {model['origin']}", markup=False)
    console.print(
        f"{machine['cpu']}, {machine['threads']} thread(s) for every contestant, torch {machine['versions']['torch']}; "
        f"reads {machine['bandwidth_gb_per_s']:.1f} GB/s; multiplies in Gflop/s: {peaks}",
        markup=False,
    )
    for title, quantities, columns in _TABLES:
        records = [record for quantity in quantities for record in result.records.get(quantity, [])]
        if records:
            console.print(_table(title, records, columns))
    for entry in result.not_measured:
        console.print(f"not measured: {entry['what']}: {entry['why']}", markup=False)
    for file in result.files:
        console.print(f"figure: {file}", markup=False)
    console.print(f"{result.seconds:.0f} seconds in all", markup=False)


def _table(title: str, records: Iterable[Record], columns: Sequence[Column]) -> Table:
    table = Table(title=title)
    for number, (name, _) in enumerate(columns):
        table.add_column(name, justify="left" if number < 2 else "right")
    for record in records:
        table.add_row(*(show(record) for _, show in columns))
    return table


def way(record: Record) -> str:
    """How a record's answers were decoded."""
    if record["threshold"] is None:
        return "AR"
    cache = record.get("sub_block_cache", "none")
    chosen = "" if cache == "none" else f", {cache} cache renewed by {record.get('cache_refresh')}"
    chosen += ", fused commit" if record.get("fused_commit") else ""
    chosen += ", verified" if record.get("verify") else ""
    return f"diffusion {record['threshold']:g}{chosen}"


def _value(digits: int, scale: float = 1.0) -> Callable[[Record], str]:
    def show(record: Record) -> str:
        low, high = record["spread"]
        value = record["value"]
        return f"{value * scale:.{digits}f} ({low * scale:.{digits}f} to {high * scale:.{digits}f})"

    return show


def _field(name: str) -> Callable[[Record], str]:
    return lambda record: str(record.get(name, ""))


def _percent(name: str) -> Callable[[Record], str]:
    return lambda record: "-" if record.get(name) is None else f"{record[name]:.0%}"


def _where(record: Record) -> str:
    parts = record.get("where_time_goes")
    return "" if parts is None else ", ".join(f"{part} {share:.0%}" for part, share in parts.items())


_WAY: Column = ("way", way)
_DTYPE: Column = ("dtype", _field("dtype"))
_BATCH: Column = ("batch", _field("batch"))
_RATE: Column = ("tokens/s", _value(1))
_RIGHT: Column = ("right", _percent("accuracy"))
_RATIO: Column = ("ratio", _value(2))
_OVER: tuple[Column, ...] = (
    _WAY,
    ("over", _field("peer")),
    _DTYPE,
    _RATIO,
    ("right, theirs", _percent("peer_accuracy")),
    _RIGHT,
)

_TABLES: tuple[tuple[str, tuple[str, ...], tuple[Column, ...]], ...] = (
    (
        "Throughput on held-out questions, median (middle half)",
        ("ar_tokens_per_s", "diffusion_tokens_per_s"),
        (_WAY, _DTYPE, _BATCH, _RATE, _RIGHT),
    ),
    (
        "Tokens per forward of any kind",
        ("tokens_per_forward",),
        (_WAY, _DTYPE, _BATCH, ("tokens per forward", _value(2)), ("forwards", _field("forwards"))),
    ),
    (
        "Block diffusion over AR: tokens/s on the same questions, paired",
        ("diffusion_over_ar",),
        (_WAY, _DTYPE, _BATCH, _RATIO, ("right, AR", _percent("ar_accuracy")), _RIGHT),
    ),
    (
        "One forward, in milliseconds",
        ("forward_s",),
        (
            _DTYPE,
            ("context", _field("context")),
            ("positions", _field("positions")),
            ("logits", lambda record: "all" if record["head"] else "none"),
            ("ms", _value(2, 1e3)),
            ("roofline ms", lambda record: f"{record['roofline_s'] * 1e3:.2f}"),
            ("over roofline", lambda record: f"{record['value'] / record['roofline_s']:.2f}"),
            ("where it goes", _where),
        ),
    ),
    (
        "Time to the first final token, in milliseconds",
        ("first_token_s",),
        (_WAY, _DTYPE, ("prompt", _field("prompt_length")), ("forwards", _field("forwards")), ("ms", _value(1, 1e3))),
    ),
    (
        "Others on the same questions, batch 1",
        ("peer_tokens_per_s",),
        (("peer", _field("peer")), _DTYPE, _RATE, _RIGHT),
    ),
    (
        "Our tokens/s over theirs, paired, batch 1, by wall time with the prompts in it",
        ("ar_over_transformers", "ar_over_llamacpp", "diffusion_over_llamacpp"),
        _OVER,
    ),
    (
        "The same after the prompt, llama.cpp by its own clock",
        ("ar_over_llamacpp_decoding", "diffusion_over_llamacpp_decoding"),
        _OVER,
    ),
    (
        "Decoding after the prefill, as contexts and batches grow",
        ("growth",),
        (_WAY, _DTYPE, ("context", _field("context")), _BATCH, _RATE),
    ),
    (
        "The same over the shortest context, paired, batch 1",
        ("growth_over_shortest",),
        (_WAY, _DTYPE, ("context", _field("context")), ("over", _field("over")), _RATIO),
    ),
    (
        "Precision: answers alone, against those in float32, and against those in a batch",
        ("precision",),
        (
            _WAY,
            _DTYPE,
            ("kernels", _field("kernels")),
            ("right", lambda record: f"{record['accuracy']:.1%} ± {record['standard_error']:.1%}"),
            ("same tokens", _percent("same_tokens")),
            ("same answers", _percent("same_answers")),
            ("same in a batch", _percent("same_in_batch")),
        ),
    ),
    (
        "int8 linear layers alone, in milliseconds for all of them",
        ("linears_s",),
        (("kernel", _field("kernel")), ("positions", _field("positions")), ("ms", _value(2, 1e3))),
    ),
)
