"""Our own CPU kernels: `kernels.cpp`, compiled on first use and called through ctypes."""

from fast_dllm.model.kernels.build import load_kernels, why_no_kernels

__all__ = ["load_kernels", "why_no_kernels"]
