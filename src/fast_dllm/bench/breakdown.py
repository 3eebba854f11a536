"""Where the time of a forward goes: torch's profiler for its operators, Python's for our own kernels."""

import cProfile
import os
from collections import defaultdict
from collections.abc import Callable
from types import CodeType
from typing import Any

from torch.profiler import ProfilerActivity, profile

from fast_dllm.model.cpu_ops import CpuOps

PARTS = ("linear", "attention", "head", "rest")
# Parts of torch's operator names. Asked in this order: attention of some models is made of matrix products in bmm.
_ATTENTION = ("scaled_dot_product", "flash_attention", "softmax", "bmm")
_LINEAR = ("linear", "addmm", "aten::mm", "matmul", "gemm", "_int_mm")
# Our kernels are called through ctypes, where torch's profiler does not see them.
_OWN_STEPS: dict[CodeType | str, str] = {
    CpuOps.linear.__code__: "linear",
    CpuOps.add_linear.__code__: "linear",
    CpuOps.store.__code__: "attention",
    CpuOps.attend.__code__: "attention",
}


def shares(forward: Callable[[], object], without_head: Callable[[], object], times: int) -> dict[str, float]:
    """Shares of a forward's time.

    Args:
        forward: ends in the LM head; warmed up.
        without_head: the same without it.
        times: forwards to profile.

    Returns:
        By part in `PARTS`, adding up to 1. For torch's operators, what Python spends between them is left out.
    """
    spent = dict.fromkeys(PARTS, 0.0)
    for _ in range(times):
        for part, time in (_own_steps(forward, without_head) or _operators(forward)).items():
            spent[part] += time
    total = sum(spent.values())
    return {part: time / total for part, time in spent.items()} if total else spent


def _own_steps(forward: Callable[[], object], without_head: Callable[[], object]) -> dict[str, float] | None:
    """Seconds by part of a forward in our own kernels; None for any other."""
    whole, body = _steps(forward), _steps(without_head)
    if "linear" not in whole:
        return None
    head = max(whole["linear"] - body["linear"], 0.0)
    return {**whole, "linear": whole["linear"] - head, "head": head}


def _steps(forward: Callable[[], object]) -> dict[str, float]:
    profiler = cProfile.Profile()
    profiler.runcall(forward)
    stats = profiler.getstats()
    spent: dict[str, float] = defaultdict(float)
    for entry in stats:
        if (part := _OWN_STEPS.get(entry.code)) is not None:
            spent[part] += entry.totaltime
    spent["rest"] = max(entry.totaltime for entry in stats) - sum(spent.values())
    return spent


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
