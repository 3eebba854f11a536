"""Time to the first token that is final."""

from functools import partial

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.bench.bench import Bench
from fast_dllm.bench.setting import Setting, usual_ways
from fast_dllm.bench.timing import WARM_UP, WARM_UP_PROMPT
from fast_dllm.config import DecodingConfig

_NEW_TOKENS = 64


def measure_first_token(bench: Bench) -> None:
    """Wait for the first token after prompts of several lengths, cache allocation and prefill included.

    Args:
        bench: gets `first_token_s`, in seconds.
    """
    plan = bench.plan
    calls = {
        (length, dtype, setting): partial(_first_token, lm, bench.questions.long_prompt(length), setting)
        for length in bench.lengths("first token", plan.prompt_lengths, room=_NEW_TOKENS)
        for dtype, lm, setting in usual_ways(bench.models, plan.thresholds)
    }
    timed = bench.race("first token", calls, plan.first_token_rounds)
    for (length, dtype, setting), rounds in timed.items():
        bench.findings.add(
            "first_token_s",
            [one.seconds for one in rounds],
            dtype=dtype,
            threshold=setting.threshold,
            prompt_length=length,
            forwards=rounds[0].result,
            **setting.labels(),
        )


def _first_token(lm: BlockDiffusionLM, prompt: list[int], setting: Setting, repetition: int) -> int:
    """Decode up to the first final token; returns the forwards it took."""
    if repetition == WARM_UP:
        prompt = prompt[-WARM_UP_PROMPT:]
    decoding = DecodingConfig(max_new_tokens=_NEW_TOKENS, **setting.decoding())
    forwards = 0
    for event in lm.stream(prompt, decoding):
        forwards += 1
        if event.event.settled > len(prompt):
            break
    return forwards
