"""`fast-dllm data`: what a model would learn from a data set, before it does."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fast_dllm.cli.options import SkipOption
from fast_dllm.cli.output import waiting

if TYPE_CHECKING:
    from rich.text import Text

    from fast_dllm.data.chat import Sample
    from fast_dllm.data.preview import Piece
    from fast_dllm.data.statistics import DataStatistics, Tally


def data(
    source: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE[:WEIGHT]...",
            help="Conversations or texts, as --data of adapt: JSONL, parquet, .txt, or a hub name (owner/name).",
            show_default=False,
        ),
    ],
    *,
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="Whose tokenizer and chat template.", show_default=False)
    ],
    samples: Annotated[int, typer.Option("--samples", min=0, help="Samples to show.")] = 3,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Read no more rows than these.")] = None,
    shuffle_buffer: Annotated[
        int, typer.Option("--shuffle-buffer", min=0, help="Take rows in a random order, out of so many held.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of that order, and of the draws by weight.")] = 0,
    max_length: Annotated[
        int, typer.Option("--max-length", min=2, help="Tokens; longer conversations are cut, longer texts split.")
    ] = 1024,
    block_size: Annotated[int, typer.Option("--block-size", min=1, help="Tokens per block.")] = 32,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows of a batch, for the padding.")] = 8,
    skip_bad_rows: SkipOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, samples with ids and loss mask.")] = False,
) -> None:
    """Show what a model would learn from a data set.

    Prints some samples as the model's chat template writes them, with what is learned between ⟦ and ⟧ and a │ where a
    block begins, and statistics: tokens, lengths, what is cut or skipped, and the share of padding with and without
    packing. Rows are read one after another; any amount of them fits into memory.
    """
    with waiting(f"reading {', '.join(source)}"):
        from fast_dllm.checkpoint import load_tokenizer_of
        from fast_dllm.data.build import stream_documents
        from fast_dllm.data.rendering import render_documents
        from fast_dllm.data.sources import BadRows
        from fast_dllm.data.statistics import Tally

        tokenizer = load_tokenizer_of(model)
        bad, tally = BadRows(skip=bool(skip_bad_rows)), Tally()
        shown: list[_Shown] = []
        documents = stream_documents(source, shuffle_buffer=shuffle_buffer, seed=seed, bad=bad)
        for document in islice(documents, rows):
            [rendered] = render_documents(tokenizer, [document], max_length=max_length, bad=bad)
            for sample in rendered:
                tally.add(sample)
                if len(shown) < samples:
                    shown.append(_Shown(document.place, sample))
        statistics = tally.result(bad.count)
        padding = _padding(tally, max_length, block_size, batch_size, seed)
    if as_json:
        found = {"statistics": statistics.to_dict(), "padding": padding, "skipped": bad.examples}
        listed = [one.to_dict(tokenizer) for one in shown]
        typer.echo(json.dumps({**found, "samples": listed}, ensure_ascii=False))
        return
    _print_samples(tokenizer, shown, block_size)
    _print_statistics(statistics, padding, bad.examples, batch_size)


@dataclass(frozen=True)
class _Shown:
    place: str
    sample: "Sample"

    def to_dict(self, tokenizer: Any) -> dict[str, Any]:
        sample = self.sample
        return {
            "place": self.place,
            "text": tokenizer.decode(sample.input_ids),
            "input_ids": sample.input_ids,
            "loss_mask": sample.loss_mask,
            "truncated": sample.truncated,
        }


def _padding(tally: "Tally", max_length: int, block_size: int, batch_size: int, seed: int) -> dict[str, float] | None:
    """Share of padding in an epoch as adapt would train it: each sample in a row of its own, and packed."""
    from fast_dllm.data.packing import first_fit
    from fast_dllm.data.statistics import padding_share
    from fast_dllm.training.schedule import run_order

    if not tally.sizes:
        return None
    padded = [-(-size // block_size) * block_size for size in tally.sizes]
    packs = first_fit(padded, -(-max_length // block_size) * block_size)

    def share(rows: list[list[int]]) -> float:
        tokens, lengths = ([sum(sizes[index] for index in row) for row in rows] for sizes in (tally.sizes, padded))
        order = run_order(lengths, len(rows), batch_size, seed)
        return round(padding_share(tokens, lengths, order, batch_size), 4)

    return {"rows_of_one": share([[index] for index in range(len(padded))]), "packed": share(packs)}


def _print_samples(tokenizer: Any, shown: Iterable[_Shown], block_size: int) -> None:
    from rich.console import Console

    from fast_dllm.data.preview import pieces_of

    console = Console(highlight=False)
    for one in shown:
        sample = one.sample
        cut = ", cut" if sample.truncated else ""
        blocks = -(-len(sample.input_ids) // block_size)
        console.print(
            f"{one.place}: {len(sample.input_ids)} tokens, {sum(sample.loss_mask)} learned, {blocks} blocks{cut}",
            style="bold",
            markup=False,
            soft_wrap=True,
        )
        console.print(_marked(pieces_of(tokenizer, sample, block_size)), soft_wrap=True)
        console.print()


def _marked(pieces: "Iterable[Piece]") -> "Text":
    """Brackets and borders are characters, not colours alone: they survive a pipe."""
    from rich.text import Text

    text, inside = Text(), False
    for piece in pieces:
        if inside and not piece.is_learned:
            text.append("⟧", style="bold green")
        if piece.begins_block:
            text.append("│", style="magenta")
        if piece.is_learned and not inside:
            text.append("⟦", style="bold green")
        text.append(piece.text.replace("\n", "↵\n"), style="green" if piece.is_learned else "bright_black")
        inside = piece.is_learned
    if inside:
        text.append("⟧", style="bold green")
    return text


def _print_statistics(
    statistics: "DataStatistics", padding: dict[str, float] | None, bad: list[str], batch_size: int
) -> None:
    found: dict[str, str] = {"samples": f"{statistics.samples:,}", "tokens": f"{statistics.tokens:,}"}
    if statistics.lengths is not None and padding is not None:
        share = statistics.response_tokens / statistics.tokens
        found["response tokens"] = f"{statistics.response_tokens:,} ({share:.0%})"
        lengths = statistics.lengths
        found["lengths"] = (
            f"{lengths.shortest} to {lengths.longest}, median {lengths.median}, 90% up to {lengths.percentile_90}"
        )
        found["padding"] = (
            f"{padding['rows_of_one']:.1%} in batches of {batch_size}, {padding['packed']:.1%} with --pack"
        )
    found["cut to length"] = (
        f"{statistics.truncated:,} samples; {statistics.lost_ends:,} end-of-turn tokens lost by that"
    )
    found["dropped"] = f"{statistics.dropped:,} samples with nothing to learn"
    found["skipped rows"] = f"{statistics.skipped_rows:,}"
    for name, value in found.items():
        typer.echo(f"{name:<15}  {value}")
    for line in bad:
        typer.echo(f"  {line}")
