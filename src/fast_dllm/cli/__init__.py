"""The command line, `fast-dllm`."""

from fast_dllm.cli.app import main

__all__ = ["main"]
