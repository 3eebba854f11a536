"""Where the time of a forward goes: torch's profiler for its operators; our own kernels say it themselves."""

import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from fast_dllm.model.cpu_ops import PARTS, kernel_seconds

# Parts of torch's operator names. Asked in this order: attention of some models is made of matrix products in bmm.
_ATTENTION = ("scaled_dot_product", "flash_attention", "softmax", "bmm")
_LINEAR = ("linear", "addmm", "aten::mm", "matmul", "gemm", "_int_mm")


def shares(forward: Callable[[], object], times: int) -> dict[str, float]:
    """Shares of a forward's time.

    Args:
        forward: ends in the LM head; warmed up.
        times: forwards to profile.

    Returns:
        By part in `PARTS`, adding up to 1. For torch's operators, what Python spends between them is left out.
    """
    spent = dict.fromkeys(PARTS, 0.0)
    for _ in range(times):
        for part, seconds in (_own_parts(forward) or _operators(forward)).items():
            spent[part] += seconds
    total = sum(spent.values())
    return {part: seconds / total for part, seconds in spent.items()} if total else spent


def _own_parts(forward: Callable[[], object]) -> dict[str, float] | None:
    """Seconds by part of a forward in our own kernels; None for any other."""
    start = time.perf_counter()
    with kernel_seconds() as spent:
        forward()
    seconds = time.perf_counter() - start
    if not any(spent.values()):
        return None
    # What Python spends between the calls is none of the kernels' parts.
    return {**spent, "rest": spent["rest"] + seconds - sum(spent.values())}


def _operators(forward: Callable[[], object]) -> dict[str, float]:
    """Self CPU time of a forward's operators, by part, in microseconds."""
    # The profiler's library writes a line on standard error whenever it starts or stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        forward()
    events: list[Any] = list(profiler.events())
    top = {id(event): _outermost(event) for event in events}
    linear = [owner for owner, part in top.values() if part == "linear"]
    # The LM head is told by its place alone: it is the last linear layer to begin.
    head = max(linear, key=lambda owner: owner.time_range.start, default=None)
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        owner, part = top[id(event)]
        spent["head" if owner is head and head is not None else part] += event.self_cpu_time_total
    return spent


def _outermost(event: Any) -> tuple[Any, str]:
    """The outermost operator around an event that belongs to a part, and that part."""
    owner, part = event, "rest"
    step = event
    while step is not None:
        if (found := _part(step.name)) != "rest":
            owner, part = step, found
        step = step.cpu_parent
    return owner, part


def _part(name: str) -> str:
    if any(piece in name for piece in _ATTENTION):
        return "attention"
    return "linear" if any(piece in name for piece in _LINEAR) else "rest"
