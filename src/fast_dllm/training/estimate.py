"""What a run will need: memory of a device and arithmetic, from formulas alone.

- Weights, gradients and AdamW's two moments: Rajbhandari et al. 2020, "ZeRO" (arXiv 1910.02054), section 3.1; sharded
  over N processes each is divided by N (stage 3, which is what FSDP does).
- Activations: the tensors that autograd keeps of a decoder layer with RMSNorm, grouped-query attention and a gated MLP,
  counted as Korthikanti et al. 2022 (arXiv 2205.05198), section 4, do for GPT; recomputing leaves a layer's input.
- Arithmetic: 2 operations a weight and position forward, twice that backward (Kaplan et al. 2020, arXiv 2001.08361,
  section 2.1); attention's backward is 2.5 of its forward (Dao 2023, arXiv 2307.08691). Of a full fine-tune
  that forward is counted twice, as flex_attention's is run.

Every token is taken for an answer and every row for full: the most that a run can need. Temporaries, fragmentation and
the runtime's own memory are not in it, so `fits` leaves a tenth of the device to them.

Names: L tokens of a row, T positions of the laid-out row, N scored tokens, D tokens of a block, V noisy views.
"""

import os
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from fast_dllm.errors import FastDLLMError
from fast_dllm.model.forward import head_width
from fast_dllm.objective import CHUNK
from fast_dllm.training.attention import supports_pieces
from fast_dllm.training.options import AdaptOptions
from fast_dllm.training.pieces import PIECE
from fast_dllm.training.quantised import BITS_PER_WEIGHT

_FLOAT32, _BFLOAT16 = 4, 2
_USABLE = 0.9
_MOST = 0.9
GIB = 1 << 30


@dataclass(frozen=True)
class Devices:
    """Where a run goes.

    Attributes:
        memory: bytes of one device.
        processes: devices of the run.
        sharded: spread weights, gradients and optimizer states over them (FSDP) instead of copying them (DDP).
    """

    memory: int
    processes: int = 1
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise FastDLLMError(f"processes={self.processes}: must be 1 or more")
        if self.memory < 1:
            raise FastDLLMError(f"device memory of {self.memory} bytes: must be more")


@dataclass(frozen=True)
class Estimate:
    """Of one device where nothing else is said; sizes in bytes.

    Attributes:
        parameters: of the base model.
        trainable: parameters with a gradient, over all devices.
        tokens: data tokens of the run, at most.
        weights: base and adapter, and bfloat16 copies where autocast makes them.
        gradients: and DDP's buckets.
        optimizer: AdamW's moments.
        activations: kept for the backward, with the logits of a chunk.
        loading: of the host, for each of its processes: the base before it goes to the device.
        flops_per_step: floating-point operations of an update.
        flops: of the run, over all devices.
    """

    parameters: int
    trainable: int
    tokens: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loading: int
    flops_per_step: float
    flops: float

    @property
    def memory(self) -> int:
        """All that the device holds."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def fits(self, devices: Devices) -> bool:
        """Whether a device has room for it."""
        return self.memory <= _USABLE * devices.memory


@dataclass(frozen=True)
class _Shape:
    """Widths of a decoder. Of one layer's matrices `linear` counts the weights, `inputs` and `outputs` add up widths.

    `kept` are those of the outputs that a full fine-tune keeps (`recompute.is_kept`), and `recomputed` the weights
    whose products it computes twice; `all` counts every parameter once; `scores` are the heads whose scores are kept:
    none, where attention is torch's.
    """

    layers: int
    hidden: int
    query: int
    key_value: int
    mlp: int
    vocabulary: int
    linear: int
    inputs: int
    outputs: int
    kept: int
    recomputed: int
    all: int
    in_pieces: bool
    scores: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> "_Shape":
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if architecture is None:
            raise _unknown(config, "it is no decoder-only language model")
        attention = "sdpa" if architecture._supports_sdpa else "eager"  # as it is loaded
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=attention)
        sizes = config.get_text_config()
        count, heads = (getattr(sizes, name, None) or 0 for name in ("num_hidden_layers", "num_attention_heads"))
        found = (x for x in model.get_decoder().modules() if isinstance(x, nn.ModuleList) and len(x) == count)
        layers = next(found, nn.ModuleList())
        products = [_inputs_and_outputs(x) for x in layers.modules() if isinstance(x, nn.Linear | Conv1D)]
        if not heads or not products:
            raise _unknown(config, "no list of layers with attention is found in it")
        # Weights elsewhere are those of experts: few of them work at a time, and no adapter is put on them.
        linear = sum(inputs * outputs for inputs, outputs in products)
        if linear < _MOST * sum(parameter.numel() for parameter in layers.parameters()):
            raise _unknown(config, "many weights of its layers are in no linear layer, as those of experts are")
        head = head_width(config)
        # Families have their own names for it; it is the widest that leads back to the stream.
        mlp = max(inputs for inputs, outputs in products if outputs == sizes.hidden_size)
        return cls(
            layers=count,
            hidden=sizes.hidden_size,
            query=heads * head,
            key_value=getattr(sizes, "num_key_value_heads", heads) * head,
            mlp=mlp,
            vocabulary=model.get_input_embeddings().num_embeddings,
            linear=linear // count,
            inputs=sum(inputs for inputs, _ in products) // count,
            outputs=sum(outputs for _, outputs in products) // count,
            kept=sum(outputs for inputs, outputs in products if inputs <= outputs) // count,
            recomputed=sum(inputs * outputs for inputs, outputs in products if outputs < inputs < mlp) // count,
            all=sum(parameter.numel() for parameter in model.parameters()),
            in_pieces=supports_pieces(model),
            scores=heads if attention == "eager" else 0,
        )

    @property
    def mlp_kept(self) -> int:
        """Of a gated MLP the gate, its activation, up, and the product; of another one five steps, as GPT-2's GELU."""
        is_gated = self.outputs >= self.query + 2 * self.key_value + 2 * self.hidden + 2 * self.mlp
        return (4 if is_gated else 5) * self.mlp


def _inputs_and_outputs(product: Any) -> tuple[int, int]:
    return (product.nx, product.nf) if isinstance(product, Conv1D) else (product.in_features, product.out_features)


def _unknown(config: PretrainedConfig, why: str) -> FastDLLMError:
    return FastDLLMError(f"model_type={config.model_type!r}: cannot be estimated: {why}; leave out --dry-run")


def estimate(config: PretrainedConfig, options: AdaptOptions, devices: Devices) -> Estimate:
    """Estimate a run.

    Args:
        config: of the model.
        options: of the run; dtype "auto" counts as float32.
        devices: where it goes.

    Raises:
        FastDLLMError: for a model that is built in another way.
    """
    shape = _Shape.of(config)
    trainable = _adapter(shape, options) if options.lora_rank else shape.all
    share = devices.processes if devices.sharded else 1
    buckets = 1 if devices.processes > 1 and not devices.sharded else 0
    rows = options.batch_size * options.accumulation
    per_step = rows * _flops(shape, options)
    return Estimate(
        parameters=shape.all,
        trainable=trainable,
        tokens=options.steps * rows * devices.processes * options.max_length,
        weights=_weights(shape, options, devices),
        gradients=_FLOAT32 * trainable * (1 + buckets) // share,
        optimizer=2 * _FLOAT32 * trainable // share,
        activations=_activations(shape, options),
        loading=(_BFLOAT16 if options.loading_dtype == "bfloat16" else _FLOAT32) * shape.all,
        flops_per_step=per_step,
        flops=per_step * options.steps * devices.processes,
    )


def check(config: PretrainedConfig, options: AdaptOptions, devices: Devices) -> Estimate:
    """The estimate of a run that fits.

    Raises:
        FastDLLMError: when it does not, naming the smallest change after which it does; or as `estimate`.
    """
    found = estimate(config, options, devices)
    if found.fits(devices):
        return found
    remedies = (text for text, run, place in _changes(options, devices) if estimate(config, run, place).fits(place))
    remedy = next((f"{text} would do" for text in remedies), "a smaller model or larger devices are needed")
    raise FastDLLMError(
        f"does not fit: {found.memory / GIB:.1f} GiB for a device of {devices.memory / GIB:.1f} GiB, a tenth of it "
        f"kept free (weights {found.weights / GIB:.1f}, gradients {found.gradients / GIB:.1f}, optimizer "
        f"{found.optimizer / GIB:.1f}, activations {found.activations / GIB:.1f}); {remedy}"
    )


def device_memory() -> int:
    """Bytes of this process's accelerator, or of this machine where there is none."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def positions(options: AdaptOptions) -> tuple[int, int]:
    """(T, N) of a full row whose every token is an answer."""
    length = options.max_length
    if options.objective == "ar":
        return length, length
    views = _views(options)
    scored = int(length * options.hidden_share)
    if options.ar_weight:
        return (views + 1) * length, scored + length
    return (views + 1) * length - options.block_size, scored  # nobody sees the last clean block


def _views(options: AdaptOptions) -> int:
    # A view that hides everything leaves nothing to its complement.
    return 2 if options.complementary and options.mask_ratio != 1 else 1


def _with_backward(options: AdaptOptions) -> int:
    """Positions of a full row that a gradient flows through: under a gated adapter, not the clean ones."""
    if options.gated_lora and not options.gradient_checkpointing:
        return _views(options) * options.max_length
    return positions(options)[0]


def _width(options: AdaptOptions) -> int:
    return _BFLOAT16 if options.dtype == "bfloat16" else _FLOAT32


def _adapter(shape: _Shape, options: AdaptOptions) -> int:
    # The mask token's row is trained too; with tied embeddings peft keeps it once.
    return options.lora_rank * (shape.inputs + shape.outputs) * shape.layers + shape.hidden


def _weights(shape: _Shape, options: AdaptOptions, devices: Devices) -> int:
    width = _width(options)
    if options.lora_rank:
        linear = shape.linear * shape.layers if options.lora_base == "nf4" else 0
        adapter = _FLOAT32 + (width if width == _BFLOAT16 else 0)
        base = width * (shape.all - linear) + int(BITS_PER_WEIGHT / 8 * linear)
        return base + adapter * _adapter(shape, options)
    if devices.sharded:
        # Two layers are gathered at a time (the next one comes while one is computed), embedding and head stay.
        gathered = 2 * shape.linear + 2 * shape.vocabulary * shape.hidden
        return _FLOAT32 * shape.all // devices.processes + width * gathered
    copied = shape.linear * shape.layers + shape.vocabulary * shape.hidden
    return _FLOAT32 * shape.all + (_BFLOAT16 * copied if width == _BFLOAT16 else 0)


def _activations(shape: _Shape, options: AdaptOptions) -> int:
    per_row, (_, scored) = _with_backward(options), positions(options)
    width, rows = _width(options), options.batch_size
    wide, lora = _FLOAT32, bool(options.lora_rank)
    # A norm keeps its input (in float32), what it multiplies by a weight that is trained, and its product.
    last = shape.hidden * (wide + (0 if lora else wide))  # what follows the last norm keeps its own rows only
    norm = last + shape.hidden * width
    attention = 2 * (shape.query + shape.key_value) * width  # q, k, v and what they come to
    scores = shape.scores * per_row
    layer = 2 * norm + attention + shape.mlp_kept * width + scores * 2 * wide + 7 * options.lora_rank * wide
    stream = shape.hidden * (width if lora else wide)
    # Without an adapter only results of attention and products that are not narrow are kept (training/recompute.py).
    products = (shape.kept + shape.query + scores) * width
    if options.gradient_checkpointing:
        kept = shape.layers * stream + layer
    else:
        kept = shape.layers * layer if lora else shape.layers * (stream + products) + layer
    seen = per_row * (per_row // 4)  # booleans of the pieces of a mask
    logits = 3 * wide * min(CHUNK, rows * options.max_length) * shape.vocabulary  # as of heads that cap them
    return rows * (per_row * (kept + last) + seen + scored * stream) + logits


def _flops(shape: _Shape, options: AdaptOptions) -> float:
    """Of one row, forward and backward."""
    per_row, scored = positions(options)
    # Frozen weights need no gradient; recomputing is a second forward.
    backward = 1 if options.lora_rank else 2
    again = 1 if options.gradient_checkpointing else 0
    is_whole = not options.lora_rank
    recomputed = shape.linear if again else shape.recomputed * is_whole
    learning = _with_backward(options)
    linear = 2.0 * shape.layers * (shape.linear * (per_row + learning * backward) + recomputed * learning)
    seen = options.max_length / 2 + PIECE if shape.in_pieces else per_row
    twice = again or (is_whole and shape.in_pieces)
    attention = 4.0 * shape.query * seen * shape.layers * (per_row + learning * (2.5 + twice))
    total = max(options.batch_size * scored, 1)
    last = (total - 1) % CHUNK + 1  # of the chunks of logits the only one that is not computed twice
    head = 2.0 * shape.hidden * shape.vocabulary * scored * (1 + (1 - last / total) + backward)
    return linear + attention + head


def _changes(options: AdaptOptions, devices: Devices) -> list[tuple[str, AdaptOptions, Devices]]:
    """What would need less, the least change first."""
    changes: list[tuple[str, AdaptOptions, Devices]] = []
    batch = options.batch_size
    while batch > 1:
        batch = batch // 2
        accumulation = options.accumulation * -(-options.batch_size // batch)
        smaller = replace(options, batch_size=batch, accumulation=accumulation)
        changes.append((f"--batch-size {batch} --accumulation {accumulation}", smaller, devices))
    changes.append(("--gradient-checkpointing", replace(options, gradient_checkpointing=True), devices))
    accumulation = options.accumulation * options.batch_size
    least = replace(options, gradient_checkpointing=True, batch_size=1, accumulation=accumulation)
    both = f"--gradient-checkpointing --batch-size 1 --accumulation {accumulation}"
    changes.append((both, least, devices))
    if options.lora_rank:
        return changes
    first = 2 * devices.processes if devices.sharded else max(devices.processes, 2)
    for processes in (first * 2**power for power in range(8)):
        spread = replace(devices, processes=processes, sharded=True)
        changes.append((f"{both} on {processes} devices with recipes/fsdp2.yaml", least, spread))
    return [*changes, (f"{both} --lora-rank 32", replace(least, lora_rank=32), devices)]
