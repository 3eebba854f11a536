"""The demo: adapt live, answer side by side, and a page to look at."""

from fast_dllm.demo.run import run_demo

__all__ = ["run_demo"]
