"""Our CPU kernels as they are built for CPUs other than this one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fast_dllm.model.kernels import build, why_no_kernels

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
pytestmark = pytest.mark.skipif(why_no_kernels() is not None, reason=str(why_no_kernels()))


@pytest.mark.parametrize(
    "cpu",
    [
        "haswell",  # AVX2
        "alderlake",  # AVX2 with products of bytes
        "skylake-avx512",
        "icelake-server",  # AVX-512 with products of bytes
    ],
)
def test_they_compile_for_every_instruction_set(cpu):
    # Not -fsyntax-only: an instruction that the CPU lacks is found when its function is put where it is called.
    command = [COMPILER, "-std=c++17", "-fopenmp", "-O1", "-S", "-o", os.devnull, str(build._SOURCES / "kernels.cpp")]
    known = subprocess.run([COMPILER, f"-march={cpu}", "-E", "-x", "c++", os.devnull], capture_output=True, check=False)
    if known.returncode != 0:
        pytest.skip(f"{COMPILER} does not know {cpu}")
    run = subprocess.run([*command, f"-march={cpu}"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="this CPU has no AVX-512 to leave out")
@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx512vnni"])
def test_with_fewer_instructions_they_compute_the_same(flag):
    names = ("test_kernels.py", "test_likeliest.py", "../training/test_attention_kernel.py")
    tests = [str(Path(__file__).parent / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(
        command,
        env={**os.environ, "FAST_DLLM_CXXFLAGS": flag},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:]


def test_flags_of_the_environment_are_added(monkeypatch, tmp_path):
    (tmp_path / "kernels.cpp").write_text("#ifndef GIVEN\n#error missing\n#endif\n", encoding="utf-8")
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FAST_DLLM_CXXFLAGS", "-DOTHER -DGIVEN=1")
    build.load_kernels.cache_clear()
    try:
        build.load_kernels()
        monkeypatch.setenv("FAST_DLLM_CXXFLAGS", "")
        build.load_kernels.cache_clear()
        with pytest.raises(OSError, match="missing"):
            build.load_kernels()
    finally:
        build.load_kernels.cache_clear()
