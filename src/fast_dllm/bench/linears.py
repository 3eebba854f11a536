"""int8 linear layers alone: our kernel beside torch's and torchao's, over the model's own weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fast_dllm.bench.bench import Bench
from fast_dllm.bench.timing import paired_ratios
from fast_dllm.errors import FastDLLMError
from fast_dllm.gated_lora import is_of_adapter
from fast_dllm.model.cpu_ops import CpuOps
from fast_dllm.model.kernels import why_no_kernels
from fast_dllm.model.linear import Int8Linear, Linear
from fast_dllm.model.native import NativeBackbone

_OURS = "ours"
_POSITIONS = (1, 8, 32)
# torchao's layers are slow enough on a CPU that more would take minutes.
_ROUNDS = 3

MakeLinear = Callable[[nn.Linear], Linear]


@torch.inference_mode()
def measure_linears(bench: Bench) -> None:
    """Run every linear layer of the model once, one after another, so that weights come from memory.

    Args:
        bench: gets `linears_s`, in seconds for all layers together, by `kernel` and `positions`; and
            `linears_over_ours`, the same over our kernel's, paired. All are given float32, and round it as they
            need to.
    """
    lm = next(iter(bench.models.values()))
    if not isinstance(lm.backbone, NativeBackbone) or lm.backbone.device.type != "cpu":
        raise FastDLLMError("they are compared for the native backbone, on a CPU")
    head = lm.checkpoint.model.get_output_embeddings()
    named = lm.checkpoint.model.named_modules()
    linears = [one for name, one in named if isinstance(one, nn.Linear) and not is_of_adapter(name)]
    layers = [one for one in linears if one is not head]
    stacks = _stacks(bench, layers, lm.backbone)
    for positions in _POSITIONS:
        inputs = {width: torch.randn(positions, width) for width in {one.in_features for one in layers}}
        calls = {kernel: partial(_run, stack, inputs) for kernel, stack in stacks.items()}
        timed = bench.race(f"int8 linear layers, {positions} positions", calls, _ROUNDS, pause_s=0)
        seconds = {kernel: [one.seconds for one in rounds] for kernel, rounds in timed.items()}
        for kernel, values in seconds.items():
            about: dict[str, Any] = {"dtype": "int8", "kernel": kernel, "positions": positions}
            bench.findings.add("linears_s", values, **about)
            if kernel != _OURS and _OURS in seconds:
                bench.findings.add("linears_over_ours", paired_ratios(values, seconds[_OURS]), **about)


def _run(stack: Sequence[tuple[int, Linear]], inputs: dict[int, Tensor], _: int) -> None:
    # The compiler counts every shape of the weights as one more compilation, and allows 8.
    with torch._dynamo.config.patch(recompile_limit=1000):
        for width, linear in stack:
            linear(inputs[width])


def _stacks(bench: Bench, layers: Sequence[nn.Linear], backbone: NativeBackbone) -> dict[str, list[tuple[int, Linear]]]:
    """By kernel, the layers with the width of their inputs."""
    makers: dict[str, Callable[[], MakeLinear]] = {
        _OURS: lambda: _ours(backbone),
        "torch, linear_prepack (fbgemm)": lambda: lambda layer: Int8Linear(layer.weight, None),
        "torch, _weight_int8pack_mm": lambda: _weight_only,
        "torchao, dynamic int8, compiled": _torchao,
    }
    stacks = {}
    for kernel, maker in makers.items():
        try:
            make = maker()
            stack = [(layer.in_features, make(layer)) for layer in layers]
            _run(stack, {width: torch.zeros(1, width) for width, _ in stack}, 0)
        except (FastDLLMError, ImportError, RuntimeError) as error:
            bench.findings.skip(f"int8 linear layers by {kernel}", error)
            continue
        stacks[kernel] = stack
    return stacks


def _ours(backbone: NativeBackbone) -> MakeLinear:
    if (why := why_no_kernels()) is not None:
        raise FastDLLMError(why)
    ops = CpuOps(replace(backbone.shape, dtype=torch.float32), backbone.attention, int8=True)

    def make(layer: nn.Linear) -> Linear:
        packed = ops.make_linear(layer.weight, None)
        return lambda inputs: ops.linear(packed, inputs, None)

    return make


def _weight_only(layer: nn.Linear) -> Linear:
    """8-bit weights, bfloat16 inputs."""
    weight = layer.weight.float()
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127
    packed, scales = (weight / scale[:, None]).round().to(torch.int8), scale.bfloat16()
    return lambda inputs: torch._weight_int8pack_mm(inputs.bfloat16(), packed, scales)


def _torchao() -> MakeLinear:
    """8-bit weights, and 8-bit inputs with a scale for each position."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    linear = torch.compile(F.linear)

    def make(layer: nn.Linear) -> Linear:
        own = nn.Linear(layer.in_features, layer.out_features, bias=False)
        own.weight = nn.Parameter(layer.weight.float(), requires_grad=False)
        quantize_(own, Int8DynamicActivationInt8WeightConfig())
        return lambda inputs: linear(inputs, own.weight)

    return make
