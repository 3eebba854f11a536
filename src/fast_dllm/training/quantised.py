"""A frozen base in 4 bits, for QLoRA: Dettmers et al. 2023 (arXiv 2305.14314)."""

from typing import Any

import torch
from torch import nn

from fast_dllm.errors import FastDLLMError

BITS_PER_WEIGHT = 4.127
"""4-bit weights, and their scales, which are themselves quantised (section 3, "Double Quantization")."""


def quantise_linears(model: Any, dtype: torch.dtype) -> None:
    """Replace the linear layers of a model's decoder by layers of 4-bit NormalFloat weights.

    Embeddings, norms and the head keep their dtype. Layers go to the accelerator one by one, where there is one, so
    that it never holds the model in full.

    Args:
        model: a transformers causal language model that is not trained; changed in place.
        dtype: of the arithmetic.

    Raises:
        FastDLLMError: when bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise FastDLLMError(
            "lora_base='nf4': bitsandbytes is not installed; run pip install '.[qlora]' in fast-dllm's directory"
        ) from error
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    linears = [(name, module) for name, module in model.get_decoder().named_modules() if type(module) is nn.Linear]
    for name, module in linears:
        has_bias = module.bias is not None
        quantised = Linear4bit(module.in_features, module.out_features, has_bias, compute_dtype=dtype, quant_type="nf4")
        quantised.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4", module=quantised)
        if has_bias:
            quantised.bias = module.bias
        # A CPU with bfloat16 would pack the weights at the first measurement for a product that has no backward.
        quantised.support_avx512bf16_for_cpu = False
        quantised.requires_grad_(False)
        parent, _, own_name = name.rpartition(".")
        # Moving is what quantises.
        setattr(model.get_decoder().get_submodule(parent), own_name, quantised.to(device))
