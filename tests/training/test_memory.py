"""glibc keeps what a training step frees, unless its user has chosen otherwise."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")

FAULTS = """
import resource, torch
from fast_dllm.training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(100 << 20) for _ in range(6)]  # more than 2 GiB in all
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
by_default, asked = faults(), keep_freed_memory()
for _ in range(6):  # until there is a place for everything
    faults()
print(by_default, asked, faults())
"""


def run(**environment):
    rest = {name: value for name, value in os.environ.items() if "MALLOC" not in name and name != "GLIBC_TUNABLES"}
    # An allocator that is preloaded keeps memory by itself.
    rest.pop("LD_PRELOAD", None)
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env={**rest, **environment}, capture_output=True, text=True, check=True
    )
    by_default, asked, after = done.stdout.split()
    return int(by_default), asked == "True", int(after)


def test_a_step_gets_the_memory_of_the_one_before():
    by_default, asked, after = run()
    assert asked
    assert after < by_default / 20


@pytest.mark.parametrize(
    "setting", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}]
)
def test_a_setting_of_the_users_own_stands(setting):
    by_default, asked, after = run(**setting)
    assert not asked
    assert after > by_default / 2
