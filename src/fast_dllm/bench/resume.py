"""Going on with a run that was interrupted, or that measures table by table."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fast_dllm.bench.findings import Findings
from fast_dllm.errors import FastDLLMError

# Options that choose what is measured now, not how.
_FREE = ("tables", "out", "resume", "base")


def take_over(about: dict[str, Any], findings: Findings, out: Path) -> float:
    """Take over what `out`/bench.json holds of a run like this one, if there is one.

    Args:
        about: of this run; gets the parts that are done, and the machine with its peaks as measured then: rooflines
            of one file are to rest on one measurement.
        findings: get the earlier ones.
        out: directory of the run.

    Returns:
        Seconds that the earlier run took.

    Raises:
        FastDLLMError: when the file cannot be read, or is of another run.
    """
    path = out / "bench.json"
    if not path.exists():
        return 0.0
    try:
        saved = json.loads(path.read_text())
        mine, theirs = _identity(json.loads(json.dumps(about))), _identity(saved)
        records = {name: value for name, value in saved.items() if isinstance(value, list)}
        not_measured, _ = records.pop("not_measured"), records.pop("files")
        seconds = float(saved["seconds"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FastDLLMError(f"{path}: is no run that can be resumed; choose another --out") from error
    for name, value in mine.items():
        if value != theirs.get(name):
            raise FastDLLMError(
                f"{path}: is of another run ({name}: {theirs.get(name)} there, {value} here); choose another --out"
            )
    about["part_seconds"], about["machine"] = saved["part_seconds"], saved["machine"]
    findings.records.update(records)
    for entry in not_measured:
        findings.skip(entry["what"], entry["why"])
    return seconds


def _identity(about: Mapping[str, Any]) -> dict[str, Any]:
    """What two halves of one run have in common."""
    machine = about["machine"]
    return {
        **{f"model's {name}": value for name, value in about["model"].items()},
        **{name: value for name, value in about["options"].items() if name not in _FREE},
        **about["plan"],
        **{name: machine[name] for name in ("cpu", "cpu_capability", "cores", "threads")},
        **{f"version of {library}": version for library, version in machine["versions"].items()},
    }
