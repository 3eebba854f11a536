"""How fast the machine reads memory and multiplies matrices."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

# Much larger than the caches of any CPU of today (the largest have some hundred MiB).
_BUFFER_BYTES = 1 << 30
_MATMUL_SIZE = 2048
_TRIAL_SIZE = 256
_TRIES = 4


@dataclass(frozen=True)
class Peaks:
    """What a roofline is made of.

    Attributes:
        threads: CPU threads it was measured with.
        bandwidth: bytes a second, reading a buffer much larger than the caches.
        flops: by dtype, floating-point (or integer) operations a second in a large matrix product.
    """

    threads: int
    bandwidth: float
    flops: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: GB/s and Gflop/s."""
        return {
            "threads": self.threads,
            "bandwidth_gb_per_s": self.bandwidth / 1e9,
            "matmul_gflop_per_s": {dtype: flops / 1e9 for dtype, flops in self.flops.items()},
        }

    @classmethod
    def from_dict(cls, machine: Mapping[str, Any]) -> Self:
        """As `to_dict` left them."""
        flops = {dtype: float(rate) * 1e9 for dtype, rate in machine["matmul_gflop_per_s"].items()}
        return cls(int(machine["threads"]), float(machine["bandwidth_gb_per_s"]) * 1e9, flops)


def emulates_bfloat16() -> bool:
    """Whether torch multiplies bfloat16 here by widening number after number, far slower than float32."""
    return not torch.accelerator.is_available() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def measure_peaks(dtypes: Iterable[str]) -> Peaks:
    """Measure bandwidth, and the matrix product in each dtype, with torch's present number of threads.

    Args:
        dtypes: names of torch dtypes, or "int8".

    Returns:
        The best of a few tries each.
    """
    return Peaks(torch.get_num_threads(), _bandwidth(), {dtype: _matmul_flops(dtype) for dtype in dtypes})


@torch.inference_mode()
def _bandwidth() -> float:
    buffer = torch.ones(_BUFFER_BYTES // 4)
    reductions: list[Callable[[], Tensor]] = [
        lambda: buffer.sum(),
        lambda: buffer.amax(),
        lambda: torch.dot(buffer, buffer),
    ]
    return _BUFFER_BYTES / min(_best_seconds(reduction) for reduction in reductions)


@torch.inference_mode()
def _matmul_flops(dtype: str) -> float:
    # The fastest way at a small size: some are plain loops on some CPUs, and would take a minute at the large one.
    seconds = [_best_seconds(product) for product in _products(_TRIAL_SIZE, dtype)]
    fastest = _products(_MATMUL_SIZE, dtype)[seconds.index(min(seconds))]
    return 2 * _MATMUL_SIZE**3 / _best_seconds(fastest)


def _products(size: int, dtype: str) -> list[Callable[[], Tensor]]:
    """The ways torch multiplies matrices of a dtype on this machine."""
    if dtype == "int8":
        return _int8_products(size)
    # A narrow dtype may also be widened and multiplied in float32, which is faster on some CPUs.
    return [_product(size, kind) for kind in dict.fromkeys((getattr(torch, dtype), torch.float32))]


def _product(size: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    matrix = torch.randn(size, size).to(dtype)
    return lambda: matrix @ matrix


def _int8_products(size: int) -> list[Callable[[], Tensor]]:
    matrix = torch.randint(-127, 128, (size, size), dtype=torch.int8)
    products: list[Callable[[], Tensor]] = [lambda: torch._int_mm(matrix, matrix.t())]
    if "fbgemm" in torch.backends.quantized.supported_engines:
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # quantised tensors are deprecated, and still the fast path
                scales, zeros = torch.full((size,), 0.01), torch.zeros(size, dtype=torch.long)
                weight = torch.quantize_per_channel(torch.randn(size, size), scales, zeros, 0, torch.qint8)
                packed = torch.ops.quantized.linear_prepack(weight, None)
        finally:
            torch.backends.quantized.engine = engine
        activations = torch.randn(size, size)
        products.append(lambda: torch.ops.quantized.linear_dynamic(activations, packed))
    return products


def _best_seconds(work: Callable[[], object]) -> float:
    """Of a few calls; the first one, which warms up, is as good as any if it is the fastest."""
    seconds = []
    for _ in range(_TRIES):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
