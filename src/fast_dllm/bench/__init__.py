"""The measuring room: what block diffusion gains on this machine, beside what else there is."""

from fast_dllm.bench.findings import BenchResult
from fast_dllm.bench.options import BenchOptions
from fast_dllm.bench.run import run_bench

__all__ = ["BenchOptions", "BenchResult", "run_bench"]
