"""`fast-dllm adapt --dry-run`: what a run would need, without running it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fast_dllm.errors import FastDLLMError
from fast_dllm.training.options import AdaptOptions

if TYPE_CHECKING:
    from fast_dllm.training.estimate import Estimate

DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print tokens, memory and arithmetic of the run, and whether it fits; do not train."
    ),
]
ProcessesOption = Annotated[int, typer.Option("--processes", help="Of a dry run: devices, each with a process.")]
ShardedOption = Annotated[
    bool, typer.Option("--sharded", help="Of a dry run: weights are spread over the devices (FSDP), not copied (DDP).")
]
DeviceMemoryOption = Annotated[
    float | None,
    typer.Option("--device-memory", metavar="GIB", help="Of a dry run: of one device. [default: this machine's]"),
]


def dry_run(model: str, options: AdaptOptions, processes: int, sharded: bool, gibibytes: float | None) -> None:
    """Print what a run would need.

    Args:
        model: what `load_checkpoint` takes; of a directory or hub id only config.json is read.
        options: of the run.
        processes: devices.
        sharded: FSDP instead of DDP.
        gibibytes: memory of one; None takes this machine's.

    Raises:
        FastDLLMError: when it does not fit, or there is no such model.
    """
    from fast_dllm.training.adapt import with_dtype
    from fast_dllm.training.estimate import GIB, Devices, check, device_memory
    from fast_dllm.training.sharding import NO_SHARDED_LORA

    memory = device_memory() if gibibytes is None else int(gibibytes * GIB)
    devices = Devices(memory, processes, sharded)
    if sharded and options.lora_rank:
        raise FastDLLMError(NO_SHARDED_LORA)
    if gibibytes is None:
        options = with_dtype(options)
    elif options.dtype == "auto":
        options = AdaptOptions(**{**options.to_dict(), "dtype": "bfloat16"})
    _tell(check(_config(model), options, devices), options, devices.processes)


def refuse_devices(processes: int, sharded: bool, gibibytes: float | None) -> None:
    """Refuse a real run that is told of devices: it would go on the one that it finds.

    Raises:
        FastDLLMError: where any of them is given.
    """
    if processes > 1 or sharded or gibibytes is not None:
        raise FastDLLMError(
            "--processes, --sharded and --device-memory describe a --dry-run; to train on several devices, start it "
            "with accelerate launch --config_file recipes/ddp.yaml or recipes/fsdp2.yaml"
        )


def _tell(found: "Estimate", options: AdaptOptions, processes: int) -> None:
    batch = options.batch_size * options.accumulation * processes

    def gib(size: int) -> str:
        return f"{size / (1 << 30):,.2f}"

    lines = {
        "parameters": f"{found.parameters / 1e6:,.1f} million; {found.trainable / 1e6:,.1f} million are trained",
        "steps": f"{options.steps:,} of {batch:,} rows of {options.max_length:,} tokens",
        "tokens": f"{found.tokens / 1e9:,.3f} billion at most",
        "memory": f"{gib(found.memory)} GiB per device, in {options.dtype}",
        "  weights": gib(found.weights),
        "  gradients": gib(found.gradients),
        "  optimizer": gib(found.optimizer),
        "  activations": gib(found.activations),
        "loading": f"{gib(found.loading)} GiB of the host's memory, for each process on it",
        "arithmetic": f"{found.flops_per_step / 1e12:,.2f} Tflop a step and device; {found.flops / 1e18:,.3f} Eflop",
    }
    for name, text in lines.items():
        typer.echo(f"{name:<14} {text}")


def _config(model: str) -> Any:
    from transformers import AutoConfig

    from fast_dllm.checkpoint import load_checkpoint
    from fast_dllm.checkpoint.quiet import quiet

    path = Path(model).expanduser()
    if (path / "config.json").exists() or ("/" in model and not path.exists()):
        try:
            with quiet():
                return AutoConfig.from_pretrained(path if path.exists() else model)
        except (OSError, ValueError, KeyError):
            pass  # load_checkpoint knows more layouts, and says what is wrong
    return load_checkpoint(model).model.config
