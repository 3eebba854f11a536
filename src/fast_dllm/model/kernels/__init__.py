"""Our own CPU kernels: `kernels.cpp` and its headers, compiled on first use and called through ctypes."""

from fast_dllm.model.kernels.build import load_kernels, why_no_kernels
from fast_dllm.model.kernels.memory import WeightMemory, huge_pages

__all__ = ["WeightMemory", "huge_pages", "load_kernels", "why_no_kernels"]
