"""Seconds of one forward, beside the roofline, and where they go."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from fast_dllm.bench.bench import Bench, Part
from fast_dllm.bench.breakdown import shares
from fast_dllm.bench.findings import Record
from fast_dllm.bench.forward import Context, fill
from fast_dllm.bench.roofline import Costs, costs_of, least_seconds

_PROFILED = 3
_ROOFLINE_POSITIONS = 8

Case = tuple[str, int, bool]
"""dtype, positions, whether the logits are computed."""


def latency_parts(bench: Bench) -> Iterator[Part]:
    """Time bare forwards: a part for each context.

    Args:
        bench: gets `forward_s`, in seconds, `forward8_over_roofline` and `where_time_goes`.
    """
    room = max(bench.plan.positions)
    for length in bench.lengths("forwards", bench.plan.contexts, room=room):
        yield f"latency, context {length}", partial(_measure, bench, length, room)


def _measure(bench: Bench, length: int, room: int) -> None:
    plan, ids = bench.plan, bench.questions.long_prompt(length)
    contexts: dict[str, Context] = {}
    with bench.calls(f"filling a context of {length}", len(bench.models)) as advance:
        for dtype, lm in bench.models.items():
            contexts[dtype] = fill(lm, ids, room)
            advance()
    calls: dict[Case, Callable[[int], None]] = {
        (dtype, positions, head): context.prepare(bench.questions.long_prompt(positions), head=head)
        for dtype, context in contexts.items()
        for positions in plan.positions
        for head in (True, False)
    }
    # Bare forwards are short: a pause before each would let caches and clocks cool down.
    timed = bench.race(f"forwards at context {length}", calls, plan.forward_rounds, pause_s=0)
    for case, rounds in timed.items():
        record = _note(bench, contexts[case[0]], case, [one.seconds for one in rounds])
        if record["head"]:
            record["where_time_goes"] = shares(partial(calls[case], 0), _PROFILED)


def _note(bench: Bench, context: Context, case: Case, seconds: list[float]) -> Record:
    dtype, positions, head = case
    costs: Costs = costs_of(context.lm.checkpoint.model, context.cache, dtype)
    least = least_seconds(costs, bench.peaks, dtype, positions, context.length, head=head)
    about: dict[str, Any] = {"dtype": dtype, "context": context.length, "positions": positions, "head": head}
    record = bench.findings.add(
        "forward_s",
        seconds,
        **about,
        roofline_s=least,
        bytes=costs.bytes(positions, context.length, head=head),
        flops=costs.flops(positions, context.length, head=head),
    )
    if head and positions == _ROOFLINE_POSITIONS:
        bench.findings.add("forward8_over_roofline", [one / least for one in seconds], **about)
    return record
