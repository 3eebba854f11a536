"""Decoding speed, prefill left out, as contexts and batches grow."""

from collections.abc import Iterator
from functools import partial

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.bench.bench import Bench
from fast_dllm.bench.decode import Decoded, decode
from fast_dllm.bench.setting import Setting, usual_ways
from fast_dllm.bench.timing import WARM_UP, WARM_UP_PROMPT
from fast_dllm.config import DecodingConfig


def measure_growth(bench: Bench) -> None:
    """Decode a fixed number of tokens after long prompts, and in larger batches.

    Args:
        bench: gets `growth`: records with `context` and `batch`, in tokens a second after the prefill.
    """
    plan = bench.plan
    calls = {
        (context, batch, dtype, setting): partial(_decode, bench, lm, context, batch, setting)
        for context, batch in dict.fromkeys(_sizes(bench))
        for dtype, lm, setting in usual_ways(bench.models, plan.thresholds[-1])
    }
    timed = bench.race("growth", calls, plan.growth_rounds)
    for (context, batch, dtype, setting), rounds in timed.items():
        found = [one.result for one in rounds]
        bench.findings.add(
            "growth",
            [decoded.tokens_per_s for decoded in found],
            batch=batch,
            threshold=setting.threshold,
            dtype=dtype,
            context=context,
            tokens_per_forward=found[0].result.total.tokens_per_forward,
            **setting.labels(),
        )


def _sizes(bench: Bench) -> Iterator[tuple[int, int]]:
    """(context, batch): every context alone, every batch at the shortest of them."""
    plan = bench.plan
    # A block may reach beyond the last token asked for.
    contexts = bench.lengths("growth", plan.growth_contexts, room=2 * plan.growth_tokens)
    yield from ((context, 1) for context in contexts)
    yield from ((contexts[0], batch) for batch in plan.growth_batches)


def _decode(bench: Bench, lm: BlockDiffusionLM, context: int, batch: int, setting: Setting, repetition: int) -> Decoded:
    prompt = bench.questions.long_prompt(WARM_UP_PROMPT if repetition == WARM_UP else context)
    decoding = DecodingConfig(max_new_tokens=bench.plan.growth_tokens, stop_token_ids=(), **setting.decoding())
    return decode(lm, [prompt] * batch, decoding)
