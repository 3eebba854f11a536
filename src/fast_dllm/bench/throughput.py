"""Tokens a second on the held-out questions: AR and block diffusion, batch sizes, thresholds, caches, dtypes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.bench.bench import Bench, Part
from fast_dllm.bench.questions import Questions
from fast_dllm.bench.setting import AR, Setting, can_diffuse, can_go_one_by_one, settings_for
from fast_dllm.bench.timing import WARM_UP, WARM_UP_TOKENS, Timed, paired_ratios
from fast_dllm.decoding.events import Statistics
from fast_dllm.generation import GenerateResult

Contestant = tuple[str, Setting]
"""dtype, and how it decodes."""
Rounds = Sequence[Timed[GenerateResult]]


@dataclass(frozen=True)
class Standing:
    """How a contestant did at one batch size.

    Attributes:
        rates: tokens a second in each repetition.
        accuracy: share of the questions answered right.
        tokens_per_forward: in each repetition.
        forwards: by kind, over all repetitions.
        new_tokens: over all repetitions, nothing behind a stop token counted.
    """

    rates: list[float]
    accuracy: float
    tokens_per_forward: list[float]
    forwards: dict[str, int] = field(default_factory=dict)
    new_tokens: int = 0


def throughput_parts(bench: Bench) -> Iterator[Part]:
    """Ask every contestant every question: a part for each batch size and dtype.

    Args:
        bench: gets `ar_tokens_per_s`, `diffusion_tokens_per_s`, `diffusion_over_ar` and `tokens_per_forward`.
    """
    for batch in bench.plan.batches:
        for dtype in bench.models:
            yield f"throughput, batch {batch}, {dtype}", partial(_measure, bench, batch, dtype)


def _measure(bench: Bench, batch: int, dtype: str) -> None:
    _say_what_is_missing(bench)
    every_way = batch <= bench.plan.every_way_up_to
    ways = settings_for(bench.models[dtype], bench.plan.thresholds, every_way=every_way)
    contestants = [(dtype, way) for way in ways]
    rounds = max(bench.plan.rounds, -(-bench.plan.items // batch))
    _note(bench, batch, race(bench, contestants, batch, rounds))


def race(bench: Bench, contestants: Sequence[Contestant], batch: int, rounds: int) -> dict[Contestant, Standing]:
    """Let contestants answer the same questions in turns.

    Args:
        bench: for its models and questions.
        contestants: who takes part.
        batch: prompts decoded at once.
        rounds: repetitions, of `batch` questions each.
    """
    calls = {contestant: partial(_ask_round, bench, contestant, batch) for contestant in contestants}
    timed = bench.race(f"throughput, batch {batch}", calls, rounds)
    return {contestant: standing(timed[contestant], bench.questions, batch) for contestant in contestants}


def _ask_round(bench: Bench, contestant: Contestant, batch: int, repetition: int) -> GenerateResult:
    dtype, setting = contestant
    prompts = bench.questions.chunk_prompts(repetition, batch)
    most = bench.options.max_new_tokens
    return ask(bench.models[dtype], prompts, setting, min(most, WARM_UP_TOKENS) if repetition == WARM_UP else most)


def ask(lm: BlockDiffusionLM, prompts: Sequence[list[int]], setting: Setting, max_new_tokens: int) -> GenerateResult:
    """Answer prompts, all at once."""
    return lm.generate(
        prompts, return_dict=True, max_batch=len(prompts), max_new_tokens=max_new_tokens, **setting.decoding()
    )


def standing(rounds: Rounds, questions: Questions, batch: int) -> Standing:
    """Sum up a contestant's rounds.

    Args:
        rounds: at least one.
        questions: those asked.
        batch: prompts decoded at once.
    """
    totals = [timed.result.total for timed in rounds]
    right: dict[int, bool] = {}
    for repetition, timed in enumerate(rounds):
        for number, answer in zip(questions.chunk(repetition, batch), timed.result.answers, strict=True):
            right.setdefault(number, questions.is_right(number, answer))
    total = sum(totals, start=Statistics())
    return Standing(
        rates=[total.new_tokens / timed.seconds for total, timed in zip(totals, rounds, strict=True)],
        accuracy=sum(right.values()) / len(right),
        tokens_per_forward=[total.tokens_per_forward for total in totals],
        forwards=dict(total.forwards_by_kind),
        new_tokens=total.new_tokens,
    )


def fastest_alone(bench: Bench, dtype: str) -> list[Setting]:
    """The fastest way to decode in blocks with a dtype at batch 1, and the fastest that is as often right as AR.

    They are read off the records, which an earlier half of the run may have left.

    Returns:
        Those that there are, once if they are one.
    """
    lm, records = bench.models[dtype], bench.findings.records
    ar, blocks = (
        [record for record in records.get(quantity, []) if (record["batch"], record["dtype"]) == (1, dtype)]
        for quantity in ("ar_tokens_per_s", "diffusion_tokens_per_s")
    )
    as_right = [record for record in blocks if ar and record["accuracy"] >= ar[0]["accuracy"]]
    found = [max(some, key=lambda record: record["value"]) for some in (blocks, as_right) if some]
    ways = settings_for(lm, bench.plan.thresholds, every_way=True)
    return list(dict.fromkeys(way for record in found for way in ways if way.is_of(record)))


def _note(bench: Bench, batch: int, standings: dict[Contestant, Standing]) -> None:
    for (dtype, setting), found in standings.items():
        ar = standings.get((dtype, AR))
        about: dict[str, Any] = {
            "batch": batch,
            "threshold": setting.threshold,
            "dtype": dtype,
            "accuracy": found.accuracy,
            "forwards": found.forwards,
            "new_tokens": found.new_tokens,
            **setting.labels(),
        }
        findings = bench.findings
        findings.add("tokens_per_forward", found.tokens_per_forward, **about)
        if setting.is_ar:
            findings.add("ar_tokens_per_s", found.rates, **about)
            continue
        about["ar_accuracy"] = None if ar is None else ar.accuracy
        findings.add("diffusion_tokens_per_s", found.rates, **about)
        if ar is not None:
            findings.add("diffusion_over_ar", paired_ratios(found.rates, ar.rates), **about)


def _say_what_is_missing(bench: Bench) -> None:
    lm = next(iter(bench.models.values()))
    if not can_diffuse(lm):
        bench.findings.skip(
            "block diffusion", "this model is autoregressive: it has no adapted mask token (fast-dllm adapt)"
        )
    if not can_go_one_by_one(lm):
        bench.findings.skip("AR", "a full-attention model has no autoregressive mode")
