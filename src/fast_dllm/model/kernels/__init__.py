"""Our own CPU kernels: `kernels.cpp` and its headers, compiled on first use and called through ctypes."""

from fast_dllm.model.kernels.build import load_kernels, why_no_kernels
from fast_dllm.model.kernels.memory import WeightMemory

__all__ = ["WeightMemory", "load_kernels", "why_no_kernels"]
