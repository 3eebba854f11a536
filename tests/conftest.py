"""Settings of all tests: one thread, reproducible examples."""

import os

import torch
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# Tiny tensors: a second thread costs more than it brings, and pytest-xdist already uses the cores.
torch.set_num_threads(1)
settings.register_profile(
    "fast_dllm",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fast_dllm")
