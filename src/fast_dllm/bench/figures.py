"""The findings drawn, where matplotlib is installed."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fast_dllm.bench.findings import BenchResult, Findings, Record
from fast_dllm.bench.report import way
from fast_dllm.files import unwritable
from fast_dllm.model.cpu_ops import PARTS

_SIZE_INCHES = (8.0, 4.8)
_DPI = 130


def write_figures(result: BenchResult, out: Path, findings: Findings) -> list[Path]:
    """Write a PNG for each table that has something to draw.

    Args:
        result: what was found.
        out: directory.
        findings: told when matplotlib is not installed.

    Returns:
        The files.

    Raises:
        FastDLLMError: when one cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        findings.skip("figures", "matplotlib is not installed; run pip install '.[bench]' in fast-dllm's directory")
        return []
    written = []
    for name, draw in _FIGURES.items():
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        if draw(figure.subplots(), result.records):
            written.append(_save(figure, out / f"{name}.png"))
    return written


def _save(figure: Any, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DPI)
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def _lines(
    axes: Any,
    records: Iterable[Record],
    label: Callable[[Record], str],
    x: Callable[[Record], float],
    scale: float = 1.0,
) -> bool:
    """One line for each label, with its middle half; whether there was anything to draw."""
    lines: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        lines[label(record)].append(record)
    for name, points in lines.items():
        points.sort(key=x)
        places = [x(point) for point in points]
        values = [point["value"] * scale for point in points]
        axes.plot(places, values, marker="o", markersize=4, label=name)
        low, high = ([point["spread"][side] * scale for point in points] for side in (0, 1))
        axes.fill_between(places, low, high, alpha=0.15)
    if lines:
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    return bool(lines)


def _way_and_dtype(record: Record) -> str:
    return f"{way(record)}, {record['dtype']}"


def _by_batch(axes: Any, records: Mapping[str, list[Record]]) -> bool:
    drawn = _lines(
        axes,
        [*records.get("ar_tokens_per_s", []), *records.get("diffusion_tokens_per_s", [])],
        _way_and_dtype,
        lambda record: float(record["batch"]),
    )
    axes.set(title="Tokens a second by batch size", xlabel="prompts decoded at once", ylabel="tokens/s")
    return drawn


def _by_accuracy(axes: Any, records: Mapping[str, list[Record]]) -> bool:
    points = [*records.get("ar_tokens_per_s", []), *records.get("diffusion_tokens_per_s", [])]
    points = [point for point in points if point["batch"] == 1]
    for dtype in dict.fromkeys(point["dtype"] for point in points):
        for is_ar, marker in ((True, "*"), (False, "o")):
            own = [p for p in points if p["dtype"] == dtype and (p["threshold"] is None) is is_ar]
            name = f"{'AR' if is_ar else 'diffusion'}, {dtype}"
            axes.scatter([p["value"] for p in own], [p["accuracy"] * 100 for p in own], marker=marker, label=name)
    axes.set(title="Speed and accuracy, batch 1", xlabel="tokens/s", ylabel="right answers, %", ylim=(0, 103))
    axes.grid(alpha=0.3)
    if points:
        axes.legend(fontsize="x-small")
    return bool(points)


def _forwards(axes: Any, records: Mapping[str, list[Record]]) -> bool:
    measured = [record for record in records.get("forward_s", []) if record["head"]]
    roofs = [{**record, "value": record["roofline_s"], "spread": [record["roofline_s"]] * 2} for record in measured]
    drawn = _lines(
        axes, measured, lambda r: f"{r['dtype']}, context {r['context']}", lambda r: float(r["positions"]), 1e3
    )
    for line in list(axes.lines):
        roof = [r for r in roofs if f"{r['dtype']}, context {r['context']}" == line.get_label()]
        axes.plot(
            [r["positions"] for r in roof], [r["value"] * 1e3 for r in roof], linestyle=":", color=line.get_color()
        )
    axes.set(title="One forward (dotted: roofline)", xlabel="positions", ylabel="ms")
    return drawn


def _parts(axes: Any, records: Mapping[str, list[Record]]) -> bool:
    profiled = [record for record in records.get("forward_s", []) if "where_time_goes" in record]
    names = [f"{r['dtype']}\n{r['context']}+{r['positions']}" for r in profiled]
    bottom = [0.0] * len(profiled)
    for part in PARTS:
        heights = [record["where_time_goes"][part] * 100 for record in profiled]
        axes.bar(range(len(names)), heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(names)), names, fontsize="xx-small")
    axes.set(title="Where the time of a forward goes (context + positions)", ylabel="% of operator time")
    axes.legend(fontsize="x-small")
    return bool(profiled)


def _growth(axes: Any, records: Mapping[str, list[Record]]) -> bool:
    alone = [record for record in records.get("growth", []) if record["batch"] == 1]
    drawn = _lines(axes, alone, _way_and_dtype, lambda record: float(record["context"]))
    axes.set(title="Decoding by context length, batch 1", xlabel="tokens of the prompt", ylabel="tokens/s")
    return drawn


_FIGURES: dict[str, Callable[[Any, Mapping[str, list[Record]]], bool]] = {
    "throughput": _by_batch,
    "accuracy": _by_accuracy,
    "forwards": _forwards,
    "where-time-goes": _parts,
    "growth": _growth,
}
