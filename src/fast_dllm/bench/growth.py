"""Decoding speed, prefill left out, as contexts and batches grow."""

from collections.abc import Iterator
from functools import partial

from fast_dllm.bench.bench import Bench, Part
from fast_dllm.bench.decode import Continuation, Pace
from fast_dllm.bench.setting import Setting, usual_ways
from fast_dllm.bench.timing import paired_ratios
from fast_dllm.config import DecodingConfig

Case = tuple[int, int, Setting]
"""Context, batch, and how it decodes."""


def growth_parts(bench: Bench) -> Iterator[Part]:
    """Decode a fixed number of tokens after long prompts, and in larger batches: a part for each dtype.

    Args:
        bench: gets `growth`: records with `context` and `batch`, in tokens a second after the prefill; and
            `growth_over_shortest`: the same over that at the shortest context, batch 1, paired.
    """
    for dtype in bench.models:
        yield f"growth, {dtype}", partial(_measure, bench, dtype)


def _measure(bench: Bench, dtype: str) -> None:
    ways = [setting for own, _, setting in usual_ways(bench.models, bench.plan.thresholds) if own == dtype]
    sizes = list(dict.fromkeys(_sizes(bench)))
    prepared: dict[tuple[int, int], Continuation] = {}
    with bench.calls(f"growth, {dtype}: prompts", len(sizes)) as advance:
        for context, batch in sizes:
            prompts = [bench.questions.long_prompt(context)] * batch
            decodings = [_decoding(bench, way) for way in ways]
            prepared[context, batch] = Continuation(bench.models[dtype], prompts, decodings)
            advance()
    calls = {
        (context, batch, way): partial(_decode, continuation, _decoding(bench, way))
        for (context, batch), continuation in prepared.items()
        for way in ways
    }
    timed = bench.race(f"growth, {dtype}", calls, bench.plan.growth_rounds)
    paces = {case: [one.result for one in rounds] for case, rounds in timed.items()}
    for case in paces:
        _note(bench, dtype, case, paces)


def _sizes(bench: Bench) -> Iterator[tuple[int, int]]:
    """(context, batch): every context alone, every batch at the shortest of them."""
    plan = bench.plan
    # A block may reach beyond the last token asked for.
    contexts = bench.lengths("growth", plan.growth_contexts, room=2 * plan.growth_tokens)
    yield from ((context, 1) for context in contexts)
    yield from ((contexts[0], batch) for batch in plan.growth_batches)


def _decoding(bench: Bench, setting: Setting) -> DecodingConfig:
    return DecodingConfig(max_new_tokens=bench.plan.growth_tokens, stop_token_ids=(), **setting.decoding())


def _decode(continuation: Continuation, decoding: DecodingConfig, _: int) -> Pace:
    return continuation.decode(decoding)


def _note(bench: Bench, dtype: str, case: Case, paces: dict[Case, list[Pace]]) -> None:
    context, batch, way = case
    about = {"batch": batch, "threshold": way.threshold, "dtype": dtype, "context": context, **way.labels()}
    found = paces[case]
    rates = [pace.tokens_per_s for pace in found]
    bench.findings.add("growth", rates, tokens_per_forward=found[0].tokens / found[0].forwards, **about)
    shortest = min(length for length, _, _ in paces)
    if batch == 1 and context > shortest:
        base = [pace.tokens_per_s for pace in paces[shortest, 1, way]]
        bench.findings.add("growth_over_shortest", paired_ratios(rates, base), over=shortest, **about)
