"""The report of a demo: report.json, and report.html drawn from the same dict."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from fast_dllm.demo.picture import loss_chart, reveal_picture
from fast_dllm.files import write_whole


def write_report(report: dict[str, Any], out: Path) -> Path:
    """Write `out`/report.json and `out`/report.html.

    Args:
        report: what `run_demo` found.
        out: directory.

    Returns:
        The page.
    """
    write_whole(out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    page = out / "report.html"
    write_whole(page, render_html(report))
    return page


def render_html(report: dict[str, Any]) -> str:
    """The page: self-contained, for screens of any width, light or dark as the reader's system is.

    Args:
        report: as in report.json.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8"))
    block_size = report["settings"]["block_size"]
    questions = report["questions"]
    live = report["live_adaptation"]
    longest = max(range(len(questions)), key=lambda i: questions[i]["diffusion"]["new_tokens"])
    fastest = max(*report["tokens_per_s"].values(), *(high for _, high in report["tokens_per_s_quartiles"].values()))
    return template.render(
        report=report,
        count=len(questions),
        pictures=[reveal_picture(question, block_size) for question in questions],
        shown=longest,
        chart=None if live is None else loss_chart(live),
        fastest=fastest,
        names={"ar": "one token at a time", "diffusion": "block diffusion"},
    )
