"""Linear layers as the native backbone runs them: dense, packed once for this CPU, or in int8.

Shape legend: T positions, I inputs, O outputs, R rank.
"""

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fast_dllm.errors import FastDLLMError
from fast_dllm.gated_lora import LowRank

Linear = Callable[[Tensor], Tensor]
"""[T, I] -> [T, O]."""

Precision = Literal["dense", "int8"]

# oneDNN chooses a layout for about this many positions; measured good from 1 to 64.
_EXPECTED_POSITIONS = 32


def make_linear(weight: Tensor, bias: Tensor | None, precision: Precision) -> Linear:
    """Make the fastest layer for these weights on their device.

    Args:
        weight: [O, I].
        bias: [O], or None.
        precision: "int8" quantises the weights per output and, at each call, the inputs per position.

    Raises:
        FastDLLMError: for int8 on a device that has no kernel for it here.
    """
    if precision == "int8":
        return Int8Linear(weight, bias)
    if weight.device.type == "cpu" and _can_pack(weight.dtype):
        return PackedLinear(weight, bias)
    return DenseLinear(weight, bias)


class AdaptedLinear:
    """A layer with a gated adapter, which acts at masked positions alone."""

    def __init__(self, base: Linear, low_rank: LowRank, dtype: torch.dtype) -> None:
        self.base = base
        self._down, self._up = low_rank.down.to(dtype), low_rank.up.to(dtype)

    def __call__(self, inputs: Tensor) -> Tensor:
        """[T, I] -> [T, O], the adapter nowhere."""
        return self.base(inputs)

    def where(self, masked: Tensor, inputs: Tensor) -> Tensor:
        """[T, I] -> [T, O], the adapter where `masked` [T, 1] is 1, not 0."""
        return self.base(inputs).addcmul_(masked, F.linear(F.linear(inputs, self._down), self._up))


class DenseLinear:
    """torch's own linear layer."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, inputs: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        return F.linear(inputs, self.weight, self.bias)


class PackedLinear:
    """Weights reordered once for oneDNN, where `F.linear` would reorder them at every call of a few positions."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_POSITIONS)
        self._bias = bias

    def __call__(self, inputs: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, "none", [], "")
        return output


class Int8Linear:
    """8-bit weights (a scale per output) and 8-bit inputs (a scale per position), float32 in and out.

    torch's dynamic int8 layer has one scale for the whole input: a position's result would depend on its
    neighbours, and one outlier would drown the rest. So each position is first divided by its largest magnitude,
    and the layer gets a fixed scale.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.device.type != "cpu" or "fbgemm" not in torch.backends.quantized.supported_engines:
            raise FastDLLMError("int8 runs on x86 CPUs; choose bfloat16 or float32 here")
        weight = weight.float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        zero = torch.zeros(len(scale), dtype=torch.long)
        engine = torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch announces that these tensors will be torchao's one day
                quantised = torch.quantize_per_channel(weight, scale.double(), zero, 0, torch.qint8)
                self._weight = torch.ops.quantized.linear_prepack(quantised, None)
        finally:
            torch.backends.quantized.engine = engine
        self._bias = None if bias is None else bias.float()
        # Without VNNI the products of two bytes are summed in 16 bits, which full 8-bit inputs overflow.
        self._levels = 127 if torch.cpu._is_vnni_supported() else 63

    def __call__(self, inputs: Tensor) -> Tensor:
        """[T, I] -> [T, O]."""
        scale = inputs.abs().amax(-1, keepdim=True).clamp_min_(1e-30)
        output: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            inputs / scale, 1 / self._levels, self._levels + 1, self._weight
        )
        return output.mul_(scale) if self._bias is None else torch.addcmul(self._bias, output, scale)


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
