"""One process of a data-parallel run: python parallel_run.py BASE OUT OPTIONS_JSON [--fsdp] [--fast-clock]."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parent.parent))

from fast_dllm.training.adapt import adapt
from fast_dllm.training.callbacks import RunClock
from fast_dllm.training.options import AdaptOptions
from samples import make_samples, stream_samples

if __name__ == "__main__":
    torch.set_num_threads(1)
    base, out, options, *flags = sys.argv[1:]
    if "--fast-clock" in flags and os.environ["RANK"] == "1":
        elapsed = RunClock.elapsed
        RunClock.elapsed = lambda self: elapsed(self) + 3600
    if "--fsdp" in flags:
        # accelerate shards on accelerators alone. FSDP itself runs on a CPU: tell accelerate that there is a GPU.
        make_state = AcceleratorState.__init__

        def with_gpu(self, *args, **kwargs):
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            make_state(self, *args, **kwargs)

        AcceleratorState.__init__ = with_gpu
    chosen = AdaptOptions(**json.loads(options))
    adapt(base, stream_samples if chosen.stream else make_samples(48), chosen, out, held_out=make_samples(4))
