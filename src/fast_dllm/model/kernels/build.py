"""Compiles `kernels.cpp` and its headers for this machine, once, and loads them."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

_SOURCES = Path(__file__).parent
# No -ffast-math: the order of sums is part of what a row's result is. Not -O3: with it GCC writes the sums of the int8
# product to memory at every step, which halves its speed.
_FLAGS = (
    "-O2 -ftree-vectorize -fvect-cost-model=dynamic -march=native -ffp-contract=fast -fno-math-errno"
    " -fno-trapping-math -std=c++17 -fPIC -shared -fopenmp"
)


@cache
def load_kernels() -> ctypes.CDLL:
    """The compiled kernels; compiles them if this machine has not yet (a few seconds).

    The library goes to `$XDG_CACHE_HOME/fast-dllm` (`~/.cache/fast-dllm`), named after all that went into it. `$CXX`
    names another compiler; `$FAST_DLLM_CXXFLAGS` adds to its flags, and not `$CXXFLAGS`, which conda sets for old CPUs:
    with -mno-avx512f the kernels are those of a CPU with AVX2 alone.

    Raises:
        OSError: when there is no compiler, or it fails; the message is one line.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise OSError("no C++ compiler found (install g++, or name one in CXX)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [path.read_text(encoding="utf-8") for path in sorted((*_SOURCES.glob("*.h"), *_SOURCES.glob("*.cpp")))]
    flags = [*_FLAGS.split(), *shlex.split(os.environ.get("FAST_DLLM_CXXFLAGS", ""))]
    parts = [*sources, *flags, version, _processor(), torch.__version__]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = _cache_directory() / f"kernels-{digest}.so"
    if not library.exists():
        _compile([compiler, *flags], library)
    return ctypes.CDLL(str(library))


@cache
def why_no_kernels() -> str | None:
    """Why our kernels cannot run here; None if they can."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.cpu._is_avx2_supported():
        return "this CPU has no AVX2"
    try:
        load_kernels()
    except OSError as error:
        return str(error)
    return None


def _compile(compiler: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        # torch brings its own OpenMP under the usual name: linked by name, the kernels share its threads.
        command = [*compiler, str(_SOURCES / "kernels.cpp"), "-o", str(made)]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            complaint = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr[:200])
            raise OSError(f"{compiler[0]} could not compile the CPU kernels: {complaint.strip()}")
        made.replace(library)


def _cache_directory() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "fast-dllm"
    except RuntimeError as error:
        raise OSError("no home directory to keep the CPU kernels in (set XDG_CACHE_HOME)") from error


def _processor() -> str:
    """What -march=native depends on: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
