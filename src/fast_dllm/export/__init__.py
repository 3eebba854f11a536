"""Export: a directory that plain transformers loads, our decode loop inside."""

from fast_dllm.export.export import export_checkpoint

__all__ = ["export_checkpoint"]
