"""What was found, and what was not measured and why."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fast_dllm.errors import FastDLLMError
from fast_dllm.spread import spread

Record = dict[str, Any]

CHECKED_KEYS = (
    "ar_tokens_per_s",
    "diffusion_tokens_per_s",
    "diffusion_over_ar",
    "tokens_per_forward",
    "ar_over_transformers",
    "diffusion_over_llamacpp",
    "forward8_over_roofline",
)
"""Lists that the JSON always has, empty where nothing was measured."""


@dataclass
class Findings:
    """Grows while the tables are measured.

    Attributes:
        records: by quantity.
        not_measured: {"what", "why"} of what could not be.
    """

    records: dict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))
    not_measured: list[dict[str, str]] = field(default_factory=list)

    def add(
        self,
        quantity: str,
        values: Sequence[float],
        *,
        batch: int = 1,
        threshold: float | None = None,
        dtype: str,
        accuracy: float | None = None,
        **more: Any,
    ) -> Record:
        """Note a quantity.

        Args:
            quantity: its name in the JSON.
            values: of each repetition, at least one.
            batch: prompts decoded at once.
            threshold: of block diffusion; None for AR.
            dtype: of the weights.
            accuracy: share of right answers; None where nothing was asked.
            **more: what else tells the record from others.

        Returns:
            The record: value (the median), spread (quartiles), repetitions and the rest.
        """
        found = spread(values)
        record = {
            "value": found.median,
            "spread": [found.low, found.high],
            "repetitions": len(values),
            "batch": batch,
            "threshold": threshold,
            "dtype": dtype,
            "accuracy": accuracy,
            **more,
        }
        self.records[quantity].append(record)
        return record

    def skip(self, what: str, why: object) -> None:
        """Name something as not measured, once: of two reasons the later one stays.

        Args:
            what: the table, dtype or peer.
            why: the reason; an error's first line is enough.
        """
        reason = " ".join(str(why).split()) or type(why).__name__
        self._forget(what)
        self.not_measured.append({"what": what, "why": reason})

    def attempt(self, part: str, measure: Callable[[], None]) -> bool:
        """Measure a part of the run: all of it, or nothing but why not, so that it can be tried again.

        Args:
            part: its name.
            measure: adds to these findings.

        Returns:
            Whether it could be measured.
        """
        before = {quantity: len(found) for quantity, found in self.records.items()}
        try:
            measure()
        except FastDLLMError as error:
            for quantity, found in self.records.items():
                del found[before.get(quantity, 0) :]
            self.skip(part, error)
            return False
        self._forget(part)
        return True

    def _forget(self, what: str) -> None:
        self.not_measured[:] = [entry for entry in self.not_measured if entry["what"] != what]


@dataclass(frozen=True)
class BenchResult:
    """A finished run.

    Attributes:
        about: date, command, model, options, plan, machine.
        records: by quantity; those in `CHECKED_KEYS` are always there.
        not_measured: {"what", "why"} each.
        seconds: wall time of the run.
        files: what was written.
    """

    about: Mapping[str, Any]
    records: Mapping[str, list[Record]]
    not_measured: Sequence[Mapping[str, str]]
    seconds: float
    files: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """One JSON object: what the run was about, then every list of records under its own name."""
        lists = {key: self.records.get(key, []) for key in dict.fromkeys((*CHECKED_KEYS, *self.records))}
        return {
            **self.about,
            "seconds": self.seconds,
            "not_measured": list(self.not_measured),
            "files": list(self.files),
            **lists,
        }
